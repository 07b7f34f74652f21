"""The memory bank: which earlier frames a frame may read, and the memories themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from glus.models.reading import KeysValues


def row_index(rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of rows on the device: (len(rows),) int64. A GPU need not be idle for it, as it is for a list."""
    return torch.from_numpy(np.array(rows, np.int64)).to(device, non_blocking=True)


class Memory(Protocol):
    """What memory attention reads of an earlier frame."""

    def layer(self, number: int) -> KeysValues:
        """Keys and values: (N, heads, M, d) each, M cells of the frame; the keys are turned by their place in the
        frame. There is no temporal encoding."""


@dataclass(frozen=True)
class FrameMemory:
    """A frame as memory attention reads it."""

    layers: tuple[KeysValues, ...]
    """See ``Memory.layer``; N rows, one for each expression."""

    def __len__(self) -> int:
        """N."""
        return len(self.layers[0][0])

    def layer(self, number: int) -> KeysValues:
        """See ``Memory``."""
        return self.layers[number]

    def rows(self, index: Sequence[int]) -> FrameMemory:
        """The memories of some expressions."""
        where = row_index(index, self.layers[0][0].device)
        return FrameMemory(tuple((keys[where], values[where]) for keys, values in self.layers))


class GatheredMemory:
    """Rows of one memory or of several, put together when a layer is read: copies of all layers would be large.

    Args:
        places: of each row: the memory, and the row there.
    """

    def __init__(self, places: Sequence[tuple[FrameMemory, int]]):
        self._places = places
        self._index: torch.Tensor | None = None
        first = places[0][0]
        if all(memory is first for memory, _ in places):  # rows usually share the frame, then it is one indexing
            self._index = row_index([slot for _, slot in places], first.layers[0][0].device)

    def layer(self, number: int) -> KeysValues:
        """See ``Memory``."""
        if self._index is not None:
            keys, values = self._places[0][0].layer(number)
            return keys[self._index], values[self._index]
        rows = [[part[slot] for part in memory.layer(number)] for memory, slot in self._places]
        keys, values = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return keys, values


@dataclass(frozen=True)
class Recalled:
    """Rows that read equally many memories, so that they can be attended to in one batch."""

    rows: list[int]
    memories: list[Memory]
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
        """Number of memories held, each of one frame and row."""
        held = {id(memory): len(memory) for slots in self._slots.values() for memory, _ in slots.values()}
        return sum(held.values())

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
        kinds: dict[bool, list[tuple[int, int]]] = defaultdict(list)
        for slot, (row, step) in enumerate(steps.items()):
            kinds[step % self.stride == 0].append((slot, row))
        for members in kinds.values():  # what is forgotten at different times must not be one tensor
            kept = memory if len(kinds) == 1 else memory.rows([slot for slot, _ in members])
            for slot, (_, row) in enumerate(members):
                self._slots[row][steps[row]] = (kept, slot)
        self.forget({row: step + 1 for row, step in steps.items()})

    def forget(self, steps: Mapping[int, int]) -> None:
        """Forget what rows cannot read any more. Needed for rows that store nothing: their memories are part of tensors
        that hold others' too.

        Args:
            steps: row -> its coming step.
        """
        for row, coming in steps.items():
            oldest = (coming - 2) // self.stride * self.stride - (self.num_frames - 2) * self.stride
            for step in list(self._slots[row]):
                on_stride = self.num_frames > 1 and step % self.stride == 0 and step >= oldest
                if step < coming - 1 and not on_stride:
                    del self._slots[row][step]


def _gather(places: Sequence[tuple[FrameMemory, int]]) -> Memory:
    memory = places[0][0]
    is_whole = all(other is memory and slot == number for number, (other, slot) in enumerate(places))
    return memory if is_whole and len(places) == len(memory) else GatheredMemory(places)
