"""Qwen2.5-VL: frames, conversations and positions of Qwen3-VL; its tower attends within windows, and only embeddings
enter the LLM. Names are those of transformers' ``Qwen2_5_VLForConditionalGeneration``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from glus import compat
from glus.models.mllm.decoder import join_configs
from glus.models.mllm.pixels import CLIP_MEAN, CLIP_STD
from glus.models.mllm.qwen3_vl import Qwen3Vl


def build_qwen2_5_vl(
    vision: dict[str, Any], text: dict[str, Any], vocab_size: int, is_tied: bool, sides: tuple[int, int]
) -> Qwen25Vl:
    """A Qwen2.5-VL with random weights.

    Args:
        vision: fields of ``transformers.Qwen2_5_VLVisionConfig``; ``out_hidden_size`` is the text model's width.
        text: fields of ``transformers.Qwen2_5_VLTextConfig``.
        vocab_size: rows of the embedding table and of the head.
        is_tied: the head is the table.
        sides: see ``Qwen3Vl``.
    """
    compat.prepare_torchvision()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"out_hidden_size": text["hidden_size"], **vision}
    net = join_configs(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision, text, vocab_size, is_tied)
    return Qwen25Vl(net, sides)


class Qwen25Vl(Qwen3Vl):
    """A Qwen2.5-VL as one ``Mllm``; see ``Qwen3Vl``."""

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Qwen3Vl.PARTS,
        "vision": tuple(f"mllm.net.model.visual.{name}." for name in ("patch_embed", "blocks")),
        "projector": ("mllm.net.model.visual.merger.",),
    }
    PUBLISHED: ClassVar[tuple[tuple[str, str], ...]] = (
        ("visual.", "mllm.net.model.visual."),
        ("model.visual.", "mllm.net.model.visual."),
        ("model.language_model.", "mllm.net.model.language_model."),
        ("model.", "mllm.net.model.language_model."),
        ("", "mllm.net."),
    )
    NORM = CLIP_MEAN, CLIP_STD

    def _tower_places(self, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers import vision_utils

        vision = self.net.config.vision_config
        window, borders = vision_utils.get_vision_window_index(grids, self._merge, vision.window_size, self._patch)
        return {"window_index": window, "cu_window_seqlens": borders}
