"""Masks as PNG files: palettes of object ids, or one file per object or sentence.

Pixels are read as the numbers that the file holds. A conversion to colour or grey would lose them: OpenCV turns the
palette indices 0, 1, 2 of Ref-YouTube-VOS into 0, 38, 75.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from glus.data.mask_store import by, no_masks, place
from glus.data.rle import Size
from glus.types import Expression

VOID = 255
"""Palette index of pixels that belong to no object for sure (DAVIS)."""
FOREGROUND = 255
"""Value of an object's pixels in a file of its own."""


class PaletteMasks:
    """Ref-YouTube-VOS train, Ref-DAVIS17: ``<folder>/<video>/<frame>.png``, whose pixels are object ids."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``."""
        masks = np.zeros((len(frames), *size), np.uint8)
        if not expression.annotation_ids:
            return masks
        values = [int(annotation_id) for annotation_id in expression.annotation_ids]
        for row, indices in enumerate(self._indices(expression, frames, size)):
            masks[row] = np.isin(indices, values)
        return masks

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.ignore``: pixels of value 255, of which Ref-YouTube-VOS has none."""
        return np.stack([indices == VOID for indices in self._indices(expression, frames, size)])

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: every frame."""
        return np.ones(len(expression.frames), bool)

    def num_objects(self, expression: Expression, size: Size) -> int:
        """The largest id in the video's first frame, by which DAVIS counts a video's objects; errors as ``read``."""
        first_HW = self._indices(expression, [0], size)[0]
        return int(first_HW[first_HW != VOID].max(initial=0))

    def _indices(self, expression: Expression, frames: Sequence[int], size: Size) -> list[np.ndarray]:
        """F arrays (H, W) uint8."""
        if not self.folder.is_dir():
            raise no_masks(self.name, self.folder)
        folder = self.folder / expression.video
        return [
            _read_png(folder / f"{expression.frames[frame]}.png", place(expression, frame), size) for frame in frames
        ]


class FolderMasks:
    """Long-RVOS, ReasonVOS, Ref-YouTube-VOS valid: ``<folder>/<annotation id>/<frame>.png`` of 0 and 255.

    Args:
        name: the dataset's.
        folder: of all masks.
        absent_is_empty: whether a frame without a file is one without the object (Long-RVOS), or one without truth.
    """

    def __init__(self, name: str, folder: Path, absent_is_empty: bool):
        self.name, self.folder, self.absent_is_empty = name, folder, absent_is_empty

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; overlapping objects are united."""
        union = np.zeros((len(frames), *size), np.uint8)
        for annotation_id in expression.annotation_ids:
            folder = self._folder(expression, annotation_id)
            for row, frame in enumerate(frames):
                path = folder / f"{expression.frames[frame]}.png"
                if path.is_file() or not self.absent_is_empty:
                    union[row] |= _read_foreground(path, place(expression, frame), size)
        return union

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> None:
        """See ``MaskStore.ignore``: these layouts have no such pixels."""
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: frames for which every object has a file, unless no file means no object."""
        is_annotated_T = np.ones(len(expression.frames), bool)
        if self.absent_is_empty:
            return is_annotated_T
        for annotation_id in expression.annotation_ids:
            there = {path.stem for path in self._folder(expression, annotation_id).glob("*.png")}
            is_annotated_T &= np.array([frame in there for frame in expression.frames])
        return is_annotated_T

    def _folder(self, expression: Expression, annotation_id: str) -> Path:
        if not self.folder.is_dir():
            raise no_masks(self.name, self.folder)
        folder = self.folder / annotation_id
        if not folder.is_dir():
            raise FileNotFoundError(f"masks of {expression.name} are missing; expected the folder {folder}")
        return folder


def _read_png(path: Path, name: str, size: Size, modes: Sequence[str] = ("P", "L")) -> np.ndarray:
    """(H, W) of the numbers that the file holds: uint8, bool for mode "1".

    Args:
        path: the file.
        name: how messages call the mask.
        size: (H, W) that it must have.
        modes: PIL modes that it may have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"mask of {name} is missing; expected {path}")
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask of {name} does not decode: {path}: {error}") from error
    if mode not in modes:
        raise ValueError(f"mask of {name}: {path} has mode {mode}; expected palette or grey ({', '.join(modes)})")
    if values.shape != tuple(size):
        raise ValueError(f"mask of {name}: {path} is {by(values.shape)}, but the frame is {by(size)} (height x width)")
    return values


def _read_foreground(path: Path, name: str, size: Size) -> np.ndarray:
    """(H, W) bool. A file of small numbers only, such as 0/1 or object ids, is an error and not an empty mask."""
    values = _read_png(path, name, size, modes=("L", "P", "1"))
    if values.dtype == bool:
        return values
    is_foreground = values >= FOREGROUND
    if values.any() and not is_foreground.any():
        raise ValueError(f"mask of {name}: {path} has values up to {values.max()}; expected foreground of {FOREGROUND}")
    return is_foreground
