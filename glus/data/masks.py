"""Which mask store each layout has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.places import mask_path
from glus.data.mask_store import FolderMasks, MaskStore, PaletteMasks, PolygonMasks, RleMasks, ShapeMasks


def open_masks(dataset: DatasetConfig) -> MaskStore:
    """The mask store of a split; it reads nothing before the first mask is asked for."""
    return STORES[dataset.layout](dataset.name, mask_path(dataset))


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
