"""Ground-truth masks: of an expression, in given frames, as 0/1 arrays of the frames' size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glus.config import DatasetConfig, Layout
from glus.data.mask_store import MaskStore
from glus.data.mask_store import by as _by
from glus.data.mask_store import place as _place
from glus.data.outline_masks import PolygonMasks, ShapeMasks
from glus.data.places import mask_path
from glus.data.png_masks import FolderMasks, PaletteMasks
from glus.data.rle import Size, decode_rle
from glus.structures import Expression


def open_masks(dataset: DatasetConfig) -> MaskStore:
    """The mask store of a split; it reads nothing before the first mask is asked for."""
    return STORES[dataset.layout](dataset.name, mask_path(dataset))


class RleMasks:
    """MeViS: ``mask_dict.json``, {annotation id: [COCO run-length code or null per frame]}.

    The file (411 MB for MeViS train) is read on first use, once per process.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self._masks: dict[str, list[dict[str, Any] | None]] | None = None

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; overlapping objects are united, never summed."""
        union = np.zeros((len(frames), *size), np.uint8)
        for annotation_id in expression.annotation_ids:
            codes = self._codes(expression, annotation_id)
            for row, frame in enumerate(frames):
                code = codes[frame]
                if code is not None:  # null: the object is absent in this frame
                    union[row] |= self._decode(code, size, f"{_place(expression, frame)}, annotation {annotation_id}")
        return union

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> None:
        """See ``MaskStore.ignore``: these layouts have no such pixels."""
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: every frame; null is an empty mask."""
        return np.ones(len(expression.frames), bool)

    def _codes(self, expression: Expression, annotation_id: str) -> list[dict[str, Any] | None]:
        if self._masks is None:
            self._masks = self._load()
        if annotation_id not in self._masks:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}")
        codes = self._masks[annotation_id]
        if len(codes) != len(expression.frames):
            raise ValueError(
                f"masks of {expression.name}: annotation {annotation_id} in {self.path} has {len(codes)} entries; "
                f"expected one for each of the video's {len(expression.frames)} frames"
            )
        return codes

    def _load(self) -> dict[str, list[dict[str, Any] | None]]:
        if not self.path.is_file():
            raise FileNotFoundError(
                f"dataset {self.name!r} has no masks at {self.path}; a split without public masks cannot be "
                "trained on or scored"
            )
        try:
            masks = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(masks, dict):
            raise ValueError(f"{self.path}: expected {{annotation id: [mask per frame]}}, found {type(masks).__name__}")
        return masks

    def _decode(self, code: Any, size: Size, place: str) -> np.ndarray:
        if not isinstance(code, dict) or "size" not in code or "counts" not in code:
            raise ValueError(f"mask of {place} in {self.path}: expected null or {{size, counts}}, found {code!r:.80}")
        if tuple(code["size"]) != tuple(size):
            raise ValueError(
                f"mask of {place} in {self.path} is {_by(code['size'])}, but the frame is {_by(size)} (height x width)"
            )
        try:
            return decode_rle(code["counts"], size)
        except ValueError as error:
            raise ValueError(f"mask of {place} in {self.path} does not decode: {error}") from error


STORES: dict[Layout, Callable[[str, Path], MaskStore]] = {
    Layout.mevis: RleMasks,
    Layout.mevis_v2: RleMasks,
    Layout.ref_youtube_vos: PaletteMasks,
    Layout.ref_youtube_vos_valid: partial(FolderMasks, absent_is_empty=False),
    Layout.ref_davis17: PaletteMasks,
    Layout.revos: RleMasks,
    Layout.reason_vos: partial(FolderMasks, absent_is_empty=False),
    Layout.lvvis: RleMasks,
    Layout.long_rvos: partial(FolderMasks, absent_is_empty=True),
    Layout.refcoco: PolygonMasks,
    Layout.reason_seg: ShapeMasks,
}
"""Which store each layout has; given the dataset's name and the file or folder of its masks."""
