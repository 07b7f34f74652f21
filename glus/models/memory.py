"""The memory bank: which earlier frames a frame may read, and the memories themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glus.models.reading import KeysValues


def row_index(rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of rows on the device: (len(rows),) int64. A GPU need not be idle for it, as it is for a list."""
    return torch.from_numpy(np.array(rows, np.int64)).to(device, non_blocking=True)


@dataclass(frozen=True)
class FrameMemory:
    """A frame as memory attention reads it."""

    layers: tuple[KeysValues, ...]
    """Of each layer: (N, heads, M, d) each, M cells of the frame; the keys are turned by their place in the frame.
    There is no temporal encoding."""

    def __len__(self) -> int:
        """N."""
        return len(self.layers[0][0])

    def rows(self, index: Sequence[int]) -> FrameMemory:
        """The memories of some expressions."""
        where = row_index(index, self.layers[0][0].device)
        return FrameMemory(tuple((keys[where], values[where]) for keys, values in self.layers))


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

    Every row counts its own steps, since key frames let rows start at different frames. A row whose [SEG] failed in a
    frame stores nothing there: its later frames find a hole, those of other rows do not. What no later step of a row
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
        self._slots: dict[int, dict[int, tuple[FrameMemory, int]]] = defaultdict(dict)  # row -> step -> place

    def __len__(self) -> int:
        """Number of frames whose memories are held for at least one row."""
        return len({id(memory) for slots in self._slots.values() for memory, _ in slots.values()})

    def recall(self, steps: Mapping[int, int]) -> Iterator[Recalled]:
        """The memories of some rows, grouped by their number; every row comes once.

        Args:
            steps: row -> its coming step, counted from 0 where the row's pass began.
        """
        groups: dict[int, list[tuple[int, list[tuple[FrameMemory, int]]]]] = defaultdict(list)
        for row, step in steps.items():
            slots = self._slots[row]
            found = [slots[s] for s in memory_frames(step, self.num_frames, self.stride) if s in slots]
            groups[len(found)].append((row, found))
        for count, members in groups.items():
            yield Recalled(
                [row for row, _ in members], [_gather([found[i] for _, found in members]) for i in range(count)]
            )

    def store(self, steps: Mapping[int, int], memory: FrameMemory) -> None:
        """Keep what rows made of a frame, and forget what none of their later steps can read.

        Args:
            steps: row -> the step it has done, in the order of ``memory``'s rows.
            memory: one row for each.
        """
        if not self.enabled:
            return
        for slot, (row, step) in enumerate(steps.items()):
            self._slots[row][step] = (memory, slot)
            self._forget(row, step + 1)

    def _forget(self, row: int, next_step: int) -> None:
        """Drop every memory that neither ``next_step`` nor a later step of the row can read."""
        oldest = (next_step - 2) // self.stride * self.stride - (self.num_frames - 2) * self.stride
        for step in list(self._slots[row]):
            on_stride = self.num_frames > 1 and step % self.stride == 0 and step >= oldest
            if step < next_step - 1 and not on_stride:
                del self._slots[row][step]


def _gather(places: Sequence[tuple[FrameMemory, int]]) -> FrameMemory:
    """One memory per place; rows usually share the frame, then it is one indexing or none at all."""
    memory = places[0][0]
    slots = [slot for _, slot in places]
    if all(other is memory for other, _ in places):
        return memory if slots == list(range(len(memory))) else memory.rows(slots)
    rows = [[(keys[slot], values[slot]) for keys, values in other.layers] for other, slot in places]
    pairs = (zip(*layer, strict=True) for layer in zip(*rows, strict=True))
    return FrameMemory(tuple((torch.stack(keys), torch.stack(values)) for keys, values in pairs))
