"""Ground truth in words of 64 pixels, each object set read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glus.data.masks import MaskStore
from glus.data.rle import Size
from glus.evaluation.bits import BitMasks
from glus.structures import Expression

Codes = Callable[[Expression, Sequence[int], Size], list[list[bytes]]]


class TargetReader:
    """The ground truth of some frames of one video; remembers what it has read.

    Args:
        masks: the mask store of the split; where it holds run-length codes they are packed as they are.
        frames: indices into the frames of an expression.
        size: (H, W).
    """

    def __init__(self, masks: MaskStore, frames: range, size: Size):
        self._masks, self._frames, self._size = masks, frames, size
        self._read: dict[tuple[tuple[str, ...], tuple[str, ...]], BitMasks] = {}

    def frames_of(self, expression: Expression) -> range:
        """Those of the frames that the expression has."""
        return self._frames[: max(len(expression.frames) - self._frames.start, 0)]

    def __call__(self, expression: Expression) -> BitMasks:
        """The union of the expression's objects in ``frames_of(expression)``; errors as ``MaskStore.read``."""
        key = expression.annotation_ids, expression.frames
        if key not in self._read:
            self._read[key] = self._pack(expression)
        return self._read[key]

    def _pack(self, expression: Expression) -> BitMasks:
        frames = self.frames_of(expression)
        codes: Codes | None = getattr(self._masks, "codes", None)
        if codes is None:
            return BitMasks.from_dense(self._masks.read(expression, frames, self._size))
        try:
            return BitMasks.from_rle(codes(expression, frames, self._size), self._size)
        except ValueError:
            return BitMasks.from_dense(self._masks.read(expression, frames, self._size))  # which says what is wrong
