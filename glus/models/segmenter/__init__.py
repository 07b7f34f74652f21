"""Segmenters, one file per family, and what all of them share: masks at another size, and the memory bank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
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
        """Masks for one prompt per row: ``logits_Nmm`` (> 0 is foreground), ``stability_N`` and what else there is."""

    def memorize(self, conditioned: Any, logits_Nmm: torch.Tensor) -> torch.Tensor:
        """Memories (N, C_mem, h, w) of a frame with its masks."""

    def step_bytes(self, num_memories: int, size: tuple[int, int]) -> int:
        """Bytes that one row takes, at most, while a frame of ``size`` (H, W) is conditioned, decoded and memorised."""

    def complete(self) -> None:
        """Set what comes from no file; again after weights have been loaded."""

    def note_trained(self) -> None:
        """To be called when ``requires_grad`` of parameters has changed."""


def upsample_masks(logits_Nmm: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mask logits at ``size`` = (H, W): bilinear in float32, no post-processing (released GLUS.py:756)."""
    return F.interpolate(logits_Nmm[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def row_index(rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of rows on the device: (len(rows),) int64. A GPU need not be idle for it, as it is for a list."""
    return torch.from_numpy(np.array(rows, np.int64)).to(device, non_blocking=True)


def memory_frames(frame: int, num_frames: int, stride: int) -> list[int]:
    """Frames that ``frame`` may read, oldest first.

    The previous frame, and ``num_frames - 1`` frames before it on multiples of ``stride``:
    ``{f-1} U {((f-2)//r)*r - k*r, k = 0 .. num_frames-2}`` without negatives (released GLUS.py:230-276). Frames are
    counted from the start of the pass, in processing order.
    """
    newest = (frame - 2) // stride * stride
    strided = {newest - k * stride for k in range(num_frames - 1)} if frame >= 2 else set()
    return sorted(f for f in strided | {frame - 1} if f >= 0)


class MemoryBank:
    """Memories of one pass over one video (or one training window), for any number of rows (expressions).

    Every row counts its own steps, since key frames let rows start at different frames. A row whose [SEG] failed in a
    frame stores nothing there: its later frames find a gap, those of other rows do not. What no later step of a row
    can read is forgotten, so the bank's size does not grow with the video.

    Args:
        num_frames: memories read at most.
        stride: distance of the strided ones.
        enabled: off, nothing is stored, so nothing is recalled.
    """

    def __init__(self, num_frames: int, stride: int, enabled: bool = True):
        self.num_frames = num_frames
        self.stride = stride
        self.enabled = enabled
        self._steps: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)  # row -> step -> (C_mem, h, w)

    @property
    def nbytes(self) -> int:
        """Of all memories held."""
        return sum(memory.untyped_storage().nbytes() for steps in self._steps.values() for memory in steps.values())

    def alike(self, steps: Mapping[int, int]) -> list[list[int]]:
        """The rows, grouped by how many memories each would recall.

        Args:
            steps: row -> its coming step, counted from 0 where the row's pass began.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for row, step in steps.items():
            groups[len(self._recalled(row, step))].append(row)
        return list(groups.values())

    def recall(self, steps: Mapping[int, int]) -> torch.Tensor | None:
        """Memories (N, T, C_mem, h, w) of rows that have equally many, oldest first; None if these are none.

        Args:
            steps: see ``alike``.
        """
        found = [self._recalled(row, step) for row, step in steps.items()]
        (count,) = {len(memories) for memories in found}
        return torch.stack([torch.stack(memories) for memories in found]) if count else None

    def _recalled(self, row: int, step: int) -> list[torch.Tensor]:
        held = self._steps[row]
        return [held[s] for s in memory_frames(step, self.num_frames, self.stride) if s in held]

    def store(self, steps: Mapping[int, int], memory_NChw: torch.Tensor) -> None:
        """Keep what rows made of a frame, and forget what none of their later steps can read.

        Args:
            steps: row -> the step it has done, in the order of ``memory_NChw``'s rows.
            memory_NChw: one row for each.
        """
        if self.enabled:
            for (row, step), memory in zip(steps.items(), memory_NChw, strict=True):
                self._steps[row][step] = memory.clone()  # a view would keep all rows' memories as long as its own
            self.forget({row: step + 1 for row, step in steps.items()})

    def forget(self, steps: Mapping[int, int]) -> None:
        """Forget what rows cannot read any more; also to be called for rows that store nothing.

        Args:
            steps: row -> its coming step.
        """
        for row, coming in steps.items():
            oldest = (coming - 2) // self.stride * self.stride - (self.num_frames - 2) * self.stride
            for step in list(self._steps[row]):
                on_stride = self.num_frames > 1 and step % self.stride == 0 and step >= oldest
                if step < coming - 1 and not on_stride:
                    del self._steps[row][step]
