"""Qwen3-VL: a ViT at each frame's own aspect ratio, whose features enter the LLM at several of its layers (deepstack),
and positions along three axes. Names are those of transformers' ``Qwen3VLForConditionalGeneration``.

Every frame is a still picture. As a video, two frames would become one, and a query frame must be itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from glus import compat
from glus.batch import TokenRows, to_device
from glus.models.mllm.decoder import Decoder, Prefix, join_configs, llm_parts, move_rotary, plain_rotary, with_visual
from glus.models.mllm.pixels import normalized, resized
from glus.tokens import ChatStyle
from glus.types import Role


def build_qwen3_vl(
    vision: dict[str, Any], text: dict[str, Any], vocab_size: int, is_tied: bool, sides: tuple[int, int]
) -> Qwen3Vl:
    """A Qwen3-VL with random weights.

    Args:
        vision: fields of ``transformers.Qwen3VLVisionConfig``; ``out_hidden_size`` is the text model's width.
        text: fields of ``transformers.Qwen3VLTextConfig``.
        vocab_size: rows of the embedding table and of the head.
        is_tied: the head is the table.
        sides: see ``Qwen3Vl``.
    """
    compat.prepare_torchvision()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"out_hidden_size": text["hidden_size"], **vision}
    net = join_configs(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision, text, vocab_size, is_tied)
    return Qwen3Vl(net, sides)


class Qwen3Vl(nn.Module):
    """A Qwen3-VL as one ``Mllm``. Its visual tokens are (1 + levels, D): the embedding, then the deepstack levels.

    Args:
        net: a ``transformers.Qwen3VLForConditionalGeneration``, with or without LoRA adapters.
        sides: a context and a query frame is seen with at most ``side ** 2`` pixels, at least a quarter of them.

    Raises:
        ValueError: there are more deepstack levels than layers that take them, or a side has no room for a token.
    """

    PREFIXES: ClassVar[tuple[str, str]] = ("mllm.net.model.language_model.", "mllm.net.")
    """See ``Decoder``."""
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": tuple(f"mllm.net.model.visual.{name}." for name in ("patch_embed", "pos_embed", "blocks")),
        "projector": tuple(f"mllm.net.model.visual.{name}." for name in ("merger", "deepstack_merger_list")),
        **llm_parts(*PREFIXES),
    }
    PUBLISHED: ClassVar[tuple[tuple[str, str], ...]] = (("", "mllm.net."),)
    NORM: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    """Mean and standard deviation that the family's processor normalises with."""
    chat = ChatStyle("chatml", "<|vision_start|>", "<|vision_end|>", has_axes=True)

    def __init__(self, net: Any, sides: tuple[int, int]):
        super().__init__()
        self.net = net
        text, visual, config = net.model.language_model, net.model.visual, net.config
        text.rotary_emb = plain_rotary(text.rotary_emb)
        visual.rotary_pos_emb = plain_rotary(visual.rotary_pos_emb)
        self.width: int = config.text_config.hidden_size
        levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
        if levels > config.text_config.num_hidden_layers:
            raise ValueError(
                f"model.vision.architecture.deepstack_visual_indexes: {levels} levels for an LLM of "
                f"{config.text_config.num_hidden_layers} layers, each of which takes one"
            )
        self.visual_shape: tuple[int, ...] = (1 + levels, self.width)
        self.roles = (Role.query,) if sides[0] == sides[1] else tuple(Role)
        self._patch: int = config.vision_config.patch_size
        self._merge: int = config.vision_config.spatial_merge_size
        self._factor = self._patch * self._merge
        for role, side in zip(Role, sides, strict=True):
            if side < self._factor:
                raise ValueError(f"model.vision.{role.value}_size={side}: expected at least {self._factor}")
        self._fit = partial(fitting_size, sides=dict(zip(Role, sides, strict=True)), factor=self._factor)
        self.prepare = partial(fitted, size_of=self._fit)
        self.decoder = Decoder(text, net, *self.PREFIXES, config.tie_word_embeddings)

    def grid(self, size_HW: tuple[int, int], role: Role) -> tuple[int, int]:
        """See ``Mllm``."""
        height, width = self._fit(size_HW, role)
        return height // self._factor, width // self._factor

    @property
    def stages(self) -> Mapping[str, nn.Module]:
        """See ``Mllm``."""
        return {"vision tower": self.net.model.visual, "LLM": self.decoder.text}

    def see(self, pixels_F3hw: torch.Tensor) -> torch.Tensor:
        """See ``Mllm``."""
        visual, device = self.net.model.visual, pixels_F3hw.device
        pixels = normalized(pixels_F3hw, *self.NORM)
        rows, columns = pixels.shape[2] // self._patch, pixels.shape[3] // self._patch
        grids, places = self._places(len(pixels), rows, columns)
        move_rotary(visual.rotary_pos_emb, device)
        places = {name: place if "seqlens" in name else to_device(place, device) for name, place in places.items()}
        seen = visual(self._patches(pixels).to(self.net.dtype), grid_thw=grids, **places)
        tokens_GTD = torch.stack([seen.pooler_output, *getattr(seen, "deepstack_features", ())], dim=1)
        return tokens_GTD.unflatten(0, (len(pixels), -1))

    def states(
        self, rows: TokenRows, visual: torch.Tensor, past: Sequence[Prefix] = (), keep: bool = False
    ) -> tuple[torch.Tensor, Prefix | None]:
        """See ``Mllm``.

        Raises:
            ValueError: visual tokens lack levels, or tokens have one position where they need three.
        """
        if visual.shape[1:] != self.visual_shape or rows.position_ids_BL.dim() != 3:
            raise ValueError(
                f"visual tokens are {tuple(visual.shape[1:])} and positions {tuple(rows.position_ids_BL.shape)}; "
                f"expected {self.visual_shape}, deepstack levels included, and three positions a token"
            )
        embeds_BLD = self.decoder.splice(rows, visual[:, 0])
        nothing_BLD = torch.zeros_like(embeds_BLD)
        levels = [with_visual(nothing_BLD, rows, visual[:, level]) for level in range(1, visual.shape[1])]
        # The text model adds levels[i] to hidden[mask] after layer i. A mask of the visual positions would make a GPU
        # wait for their number, so the levels are as long as the rows, zero elsewhere, and the mask is all rows.
        every_row = torch.arange(len(embeds_BLD), device=embeds_BLD.device)
        deepstack = {"visual_pos_masks": every_row, "deepstack_visual_embeds": levels} if levels else {}
        positions = rows.position_ids_BL.permute(2, 0, 1)
        return self.decoder.states(rows, embeds_BLD, past, keep, positions, **deepstack)

    def _patches(self, pixels_F3hw: torch.Tensor) -> torch.Tensor:
        """(F h w / p^2, 3 t p p), a frame repeated t times; the patches of one token stand together."""
        merge, patch = self._merge, self._patch
        frames, channels, height, width = pixels_F3hw.shape
        blocks = (height // patch // merge, merge, patch, width // patch // merge, merge, patch)
        patches = pixels_F3hw.reshape(frames, channels, *blocks).permute(0, 2, 5, 3, 6, 1, 4, 7)
        times = self.net.config.vision_config.temporal_patch_size
        repeated = patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, times, -1, -1)
        return repeated.reshape(-1, channels * times * patch**2)

    def _places(self, num_frames: int, rows: int, columns: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Frames' grids of patches, and what the tower would compute of them while a GPU waits; all on the CPU."""
        from transformers import vision_utils

        with torch.device("cpu"):
            grids = torch.tensor([[1, rows, columns]] * num_frames)
            positions = vision_utils.get_vision_position_ids(grids, self._merge)
            borders = vision_utils.get_vision_cu_seqlens(grids)
            return grids, {"position_ids": positions, "cu_seqlens": borders, **self._tower_places(grids)}

    def _tower_places(self, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What this family's tower needs besides."""
        from transformers import vision_utils

        visual = self.net.model.visual
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=self._merge,
        )
        return {"interp_indices": indices, "interp_weights": weights}


def fitting_size(size_HW: tuple[int, int], role: Role, sides: Mapping[Role, int], factor: int) -> tuple[int, int]:
    """Height and width that a frame is seen at: multiples of ``factor``, its aspect ratio nearly kept.

    Args:
        size_HW: of the frame.
        role: what it is shown as.
        sides: see ``Qwen3Vl``.
        factor: pixels along a visual token.
    """
    compat.prepare_torchvision()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    most = sides[role] ** 2
    return smart_resize(*size_HW, factor, max(factor**2, most // 4), most)


def fitted(frame_HW3: np.ndarray, role: Role = Role.query, *, size_of: partial[tuple[int, int]]) -> np.ndarray:
    """What the tower sees of a frame: (h, w, 3) uint8 RGB."""
    return resized(frame_HW3, size_of(frame_HW3.shape[:2], role))
