"""Ground truth in words of 64 pixels, each object set read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glus.data.mask_store import MaskStore
from glus.data.masks import RleMasks
from glus.data.rle import Size
from glus.evaluation.bits import BitMasks
from glus.structures import Expression


class TargetReader:
    """The ground truth of some frames of one video; remembers what it has read.

    Args:
        masks: the mask store of the split; where it holds run-length codes they are packed as they are.
        frames: indices into the frames of an expression.
        size: (H, W).
    """

    def __init__(self, masks: MaskStore, frames: Sequence[int], size: Size):
        self._masks, self._frames, self._size = masks, frames, size
        self._read: dict[tuple[tuple[str, ...], tuple[int, ...]], BitMasks] = {}

    def __call__(self, expression: Expression, frames: Sequence[int] | None = None) -> BitMasks:
        """The union of the expression's objects in all the frames, or in these; errors as ``MaskStore.read``."""
        chosen = tuple(self._frames if frames is None else frames)
        key = expression.annotation_ids, chosen
        if key not in self._read:
            self._read[key] = self._pack(expression, chosen)
        return self._read[key]

    def ignored(self, expression: Expression, frames: Sequence[int]) -> BitMasks | None:
        """The pixels whose truth is unknown, see ``MaskStore.ignore``."""
        pixels_FHW: np.ndarray | None = self._masks.ignore(expression, frames, self._size)
        return None if pixels_FHW is None else BitMasks.from_dense(pixels_FHW)

    def _pack(self, expression: Expression, frames: Sequence[int]) -> BitMasks:
        if isinstance(self._masks, RleMasks):
            codes = self._masks.codes(expression, frames, self._size)
            try:
                return BitMasks.from_rle(codes, self._size)
            except ValueError:
                pass  # reading them as pixels says which one is damaged
        return BitMasks.from_dense(self._masks.read(expression, frames, self._size))
