"""The memory bank: which earlier frames a frame may read, and the memories themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FrameMemory:
    """What the memory encoder keeps of one frame."""

    features_NChw: torch.Tensor
    """(N, C_mem, h, w)."""
    position_1Chw: torch.Tensor
    """(1, C_mem, h, w): 2-D sine encoding, the same for every frame; there is no temporal encoding."""

    def rows(self, index: Sequence[int]) -> FrameMemory:
        """The memories of some expressions."""
        return FrameMemory(self.features_NChw[list(index)], self.position_1Chw)


@dataclass(frozen=True)
class Recalled:
    """Rows that read equally many memories, so that they can be attended to in one batch."""

    rows: list[int]
    memories: list[FrameMemory]
    """Oldest first, one row each per entry of ``rows``; empty for rows that have no memory."""


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

    A row whose [SEG] failed in a frame stores nothing there: its later frames find a hole, those of other rows do
    not. What no later frame can read is forgotten, so the bank's size does not grow with the video.

    Args:
        num_frames: memories read at most.
        stride: distance of the strided ones.
        enabled: off, nothing is stored, so nothing is recalled.
        detach: store memories without their gradient history.
    """

    def __init__(self, num_frames: int, stride: int, enabled: bool = True, detach: bool = True):
        self.num_frames = num_frames
        self.stride = stride
        self.enabled = enabled
        self.detach = detach
        self._memories: dict[int, FrameMemory] = {}
        self._slot: dict[int, dict[int, int]] = {}  # frame -> row -> index into its FrameMemory

    def __len__(self) -> int:
        return len(self._memories)

    def recall(self, frame: int, rows: Sequence[int]) -> Iterator[Recalled]:
        """``rows`` grouped by equal number of memories, with those memories; every row comes once."""
        candidates = [f for f in memory_frames(frame, self.num_frames, self.stride) if f in self._memories]
        groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for row in rows:
            found = [f for f in candidates if row in self._slot[f]]
            groups[len(found)].append((row, found))
        for count, members in groups.items():
            memories = [self._gather([(row, found[i]) for row, found in members]) for i in range(count)]
            yield Recalled([row for row, _ in members], memories)

    def _gather(self, where: list[tuple[int, int]]) -> FrameMemory:
        """One memory per (row, frame); rows usually share the frame, then it is one indexing."""
        frames = {frame for _, frame in where}
        if len(frames) == 1:
            (frame,) = frames
            slots = [self._slot[frame][row] for row, _ in where]
            memory = self._memories[frame]
            whole = slots == list(range(len(memory.features_NChw)))
            return memory if whole else memory.rows(slots)
        parts = [self._memories[frame].features_NChw[self._slot[frame][row]] for row, frame in where]
        return FrameMemory(torch.stack(parts), self._memories[where[0][1]].position_1Chw)

    def store(self, frame: int, memory: FrameMemory, rows: Sequence[int]) -> None:
        """Keep the memories that ``rows`` made of ``frame``, and forget what no frame after it can read."""
        if not self.enabled:
            return
        if self.detach:
            memory = FrameMemory(memory.features_NChw.detach(), memory.position_1Chw)
        self._memories[frame] = memory
        self._slot[frame] = {row: slot for slot, row in enumerate(rows)}
        self.forget(frame + 1)

    def forget(self, next_frame: int) -> None:
        """Drop every memory that neither ``next_frame`` nor a later frame can read."""
        oldest = (next_frame - 2) // self.stride * self.stride - (self.num_frames - 2) * self.stride
        for frame in list(self._memories):
            on_stride = self.num_frames > 1 and frame % self.stride == 0 and frame >= oldest
            if frame < next_frame - 1 and not on_stride:
                del self._memories[frame], self._slot[frame]
