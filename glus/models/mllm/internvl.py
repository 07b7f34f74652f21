"""InternVL: a ViT's patches shuffled four into one, an MLP, and a text model of transformers (Qwen2 in InternVL3).

A frame is seen as one square, its aspect ratio not kept, as the family sees frames of a video; the tiles that it cuts
still pictures into are not made. Names are those of transformers' ``InternVLForConditionalGeneration``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from glus import compat
from glus.batch import TokenRows
from glus.models.mllm.decoder import Decoder, Prefix, join_configs, llm_parts, plain_rotary
from glus.models.mllm.pixels import normalized, resized
from glus.tokens import ChatStyle
from glus.types import Role

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the family's processor normalises with (transformers' conversion script)."""


def build_internvl(
    vision: dict[str, Any], text: dict[str, Any], vocab_size: int, is_tied: bool, sides: tuple[int, int], pool: int
) -> InternVL:
    """An InternVL with random weights.

    Args:
        vision: fields of ``transformers.InternVLVisionConfig``.
        text: fields of the text model's config; ``model_type`` names it (default: qwen2).
        vocab_size: rows of the embedding table and of the head.
        is_tied: the head is the table.
        sides: pixels of the square that a context and a query frame is seen as.
        pool: see ``InternVL``.
    """
    compat.prepare_torchvision()
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    net = join_configs(InternVLConfig, InternVLForConditionalGeneration, vision, text, vocab_size, is_tied)
    return InternVL(net, sides, pool)


class InternVL(nn.Module):
    """An InternVL as one ``Mllm``.

    Args:
        net: a ``transformers.InternVLForConditionalGeneration``, with or without LoRA adapters.
        sides: see ``build_internvl``.
        pool: the tokens of a frame are averaged over squares of ``pool`` x ``pool``; 1: all are kept.

    Raises:
        ValueError: the squares cannot be cut into patches, or their tokens into pools.
    """

    PREFIXES: ClassVar[tuple[str, str]] = ("mllm.net.model.language_model.", "mllm.net.")
    """See ``Decoder``."""
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("mllm.net.model.vision_tower.",),
        "projector": ("mllm.net.model.multi_modal_projector.",),
        **llm_parts(*PREFIXES),
    }
    PUBLISHED: ClassVar[tuple[tuple[str, str], ...]] = (
        ("language_model.model.", "mllm.net.model.language_model."),
        ("language_model.lm_head.", "mllm.net.lm_head."),
        ("vision_tower.", "mllm.net.model.vision_tower."),
        ("multi_modal_projector.", "mllm.net.model.multi_modal_projector."),
        ("", "mllm.net."),
    )
    chat = ChatStyle("chatml", "<img>", "</img>", after_image="\n")

    def __init__(self, net: Any, sides: tuple[int, int], pool: int):
        super().__init__()
        self.net = net
        self.pool = pool
        config, text = net.config, net.model.language_model
        text.rotary_emb = plain_rotary(text.rotary_emb)
        self.width: int = config.text_config.hidden_size
        self.visual_shape: tuple[int, ...] = (self.width,)
        self._sides = dict(zip(Role, sides, strict=True))
        self.roles = (Role.query,) if sides[0] == sides[1] else tuple(Role)
        self.prepare = partial(square, sides=self._sides)
        self.decoder = Decoder(text, net, *self.PREFIXES, config.tie_word_embeddings)
        step = self._step = config.vision_config.patch_size[0] * round(1 / config.downsample_ratio) * pool
        for role, side in self._sides.items():
            if side % step:
                raise ValueError(
                    f"model.vision.{role.value}_size={side}: expected a multiple of {step}, the side of a visual token"
                )

    def grid(self, size_HW: tuple[int, int], role: Role) -> tuple[int, int]:
        """See ``Mllm``."""
        side = self._sides[role] // self._step
        return side, side

    @property
    def stages(self) -> Mapping[str, nn.Module]:
        """See ``Mllm``."""
        return {"vision tower": self.net.model.vision_tower, "LLM": self.decoder.text}

    def see(self, pixels_F3ss: torch.Tensor) -> torch.Tensor:
        """See ``Mllm``."""
        model = self.net.model
        pixels = normalized(pixels_F3ss, IMAGENET_MEAN, IMAGENET_STD).to(self.net.dtype)
        patches = model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]  # without CLS
        side = math.isqrt(patches.shape[1])
        shuffled = model.pixel_shuffle(patches.unflatten(1, (side, side)), model.config.downsample_ratio)
        tokens_FrcD = model.multi_modal_projector(shuffled)
        if self.pool > 1:
            tokens_FrcD = F.avg_pool2d(tokens_FrcD.permute(0, 3, 1, 2), self.pool).permute(0, 2, 3, 1)
        return tokens_FrcD.flatten(1, 2)

    def states(
        self, rows: TokenRows, visual: torch.Tensor, past: Sequence[Prefix] = (), keep: bool = False
    ) -> tuple[torch.Tensor, Prefix | None]:
        """See ``Mllm``."""
        return self.decoder.states(rows, self.decoder.splice(rows, visual), past, keep)


def square(frame_HW3: np.ndarray, role: Role = Role.query, *, sides: Mapping[Role, int]) -> np.ndarray:
    """What the tower sees of a frame, squeezed to a square: (side, side, 3) uint8 RGB."""
    return resized(frame_HW3, (sides[role], sides[role]))
