"""Where each layout has its expression file, its frames and its masks: the officially distributed folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from glus.config import DatasetConfig, Layout


@dataclass(frozen=True)
class Places:
    """Paths below a dataset's root; ``{split}`` stands for the name of the split."""

    expressions: tuple[str, ...]
    """Names that the expression file is known to have, the first that exists counts."""
    images: str
    """Folder of the frames."""
    masks: str
    """File or folder of the masks."""


_MEVIS = tuple(
    f"{{split}}/{name}.json" for name in ("meta_expressions", "meta_expressions_v2", "meta_expressions_v2_release")
)
_YOUTUBE = Places(("meta_expressions/{split}/meta_expressions.json",), "{split}/JPEGImages", "{split}/Annotations")

PLACES: dict[Layout, Places] = {
    Layout.mevis: Places(_MEVIS, "{split}/JPEGImages", "{split}/mask_dict.json"),
    Layout.mevis_v2: Places((*_MEVIS[1:], _MEVIS[0]), "{split}/JPEGImages", "{split}/mask_dict.json"),
    Layout.ref_youtube_vos: _YOUTUBE,
    Layout.ref_youtube_vos_valid: _YOUTUBE,
    Layout.ref_davis17: _YOUTUBE,
    Layout.revos: Places(("meta_expressions_{split}_.json",), "JPEGImages", "mask_dict.json"),
    Layout.reason_vos: Places(("meta_expressions.json",), "JPEGImages", "Annotations"),
    Layout.lvvis: Places(("{split}/meta_expressions.json",), "{split}/JPEGImages", "{split}/mask_dict.json"),
    Layout.long_rvos: Places(("{split}/meta_expressions.json",), "{split}/JPEGImages", "{split}/Annotations"),
    Layout.refcoco: Places(("refs(unc).p", "refs(umd).p"), "../images/mscoco/images/train2014", "instances.json"),
    Layout.reason_seg: Places(("{split}",), "{split}", "{split}"),
}
"""MeViS' version 2 has file names of its own, but its documents also speak of version 1's."""


def expression_path(dataset: DatasetConfig) -> Path:
    """The expression file of a split (ReasonSeg: the folder of its files).

    Raises:
        FileNotFoundError: it is at none of the layout's places.
    """
    names = PLACES[dataset.layout].expressions if dataset.expressions is None else (dataset.expressions,)
    candidates = [_below_root(dataset, name) for name in names]
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"dataset {dataset.name!r} ({dataset.layout.value} layout) has no expression file; "
        f"expected {' or '.join(str(path) for path in candidates)}"
    )


def image_folder(dataset: DatasetConfig) -> Path:
    """The folder of a split's frames."""
    return _below_root(dataset, dataset.images or PLACES[dataset.layout].images)


def mask_path(dataset: DatasetConfig) -> Path:
    """The file or folder of a split's masks."""
    return _below_root(dataset, dataset.masks or PLACES[dataset.layout].masks)


def _below_root(dataset: DatasetConfig, name: str) -> Path:
    return Path(os.path.normpath(Path(dataset.root) / name.replace("{split}", dataset.split)))
