"""Segmenters, one file per family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import nn


class Segmenter(Protocol):
    """The seam where another family enters; a family is an ``nn.Module`` that holds no state of a video.

    Features of frames are the family's own, with ``frame(index)`` (one of them) and ``rows(index)`` (some, repeated);
    those of one frame stand for any number of rows. Memories are plain tensors with a leading row dimension.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    """What ``model.trainable`` may name of the family: part -> substrings of the names of its parameters."""
    NEVER_UPDATED: ClassVar[tuple[str, ...]]
    """Names of parameters that are declared trainable, as released, yet never learn."""
    width: int
    """C: of prompts."""
    multimask_fallback: bool
    """Whether inference is to decode with the fallback."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""

    @property
    def stages(self) -> Mapping[str, tuple[nn.Module, ...]]:
        """The parts that costs are told apart by."""

    def prepare_frames(self, frames_FHWC: torch.Tensor) -> torch.Tensor:
        """Frames, uint8 RGB on the device, as ``encode_frames`` takes them."""

    def encode_frames(self, images: torch.Tensor) -> Any:
        """Features of prepared frames."""

    def condition(self, frame: Any, memories_NTChw: torch.Tensor | None) -> Any:
        """What decoder *and* memory encoder see: N rows of features with their T memories in mind."""

    def decode(self, conditioned: Any, prompt_NC: torch.Tensor, fallback: bool = False) -> Any:
        """Masks for one prompt per row: ``logits_Nmm`` (> 0 is foreground), ``stability_N``, what it expects of them
        (``predicted_iou_N`` in [0, 1], ``object_logits_N``), and what else there is."""

    def memorize(self, conditioned: Any, logits_Nmm: torch.Tensor) -> torch.Tensor:
        """Memories (N, C_mem, h, w) of a frame with its masks."""

    def step_bytes(self, num_memories: int, size: tuple[int, int]) -> int:
        """Bytes that one row takes, at most, while a frame of ``size`` (H, W) is conditioned, decoded and memorised."""

    def complete(self) -> None:
        """Set what comes from no file; again after weights have been loaded."""

    def note_trained(self) -> None:
        """To be called when ``requires_grad`` of parameters has changed."""
