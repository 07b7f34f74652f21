"""Masks in PNG files: palettes whose pixels are object ids, or a folder per object or sentence with files of 0 and 255.

Pixels are read as the numbers that the file holds. A conversion to colour or grey would lose them: OpenCV turns the
palette indices 0, 1, 2 of Ref-YouTube-VOS into 0, 38, 75.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from glus.data.masks import FOREGROUND, MaskStore, Size, frame_name, require_size
from glus.files import field, read_object
from glus.types import Expression, Video

VOID = 255
"""Palette index of pixels that belong to no object for sure (DAVIS)."""


class PaletteMasks(MaskStore):
    """Ref-YouTube-VOS train, Ref-DAVIS17: ``<folder>/<video>/<frame>.png``, whose pixels are object ids."""

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``."""
        values = [int(annotation_id) for annotation_id in expression.annotation_ids]
        return [np.isin(self._indices(expression, frame, size), values)] if values else []

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray | None:
        """See ``MaskStore.ignore``: pixels of value 255, of which Ref-YouTube-VOS has none."""
        return np.stack([self._indices(expression, frame, size) == VOID for frame in frames])

    def files(self, video: Video) -> list[list[Path]]:
        """See ``MaskStore.files``."""
        paths = [self._file(video[0], frame) for frame in range(len(video[0].frames))]
        return [[path for path in paths if path.is_file()]]

    def values(self, video: Video) -> set[int]:
        """See ``MaskStore.values``."""
        return {0, VOID, *(int(annotation_id) for one in video for annotation_id in one.annotation_ids)}

    def listed_objects(self) -> dict[str, set[int]]:
        """The objects of each video in ``meta.json`` beside the masks, where Ref-YouTube-VOS lists also those that no
        sentence is about.

        Raises:
            ValueError: it is malformed.
        """
        path = self.path.parent / "meta.json"
        if not path.is_file():
            return {}
        videos = field(read_object(path), "videos", dict, str(path))
        return {
            video: {int(number) for number in field(content, "objects", dict, f"{path}: videos[{video!r}]")}
            for video, content in videos.items()
        }

    def num_objects(self, expression: Expression, size: Size) -> int:
        """The largest id in the video's first frame, by which DAVIS counts a video's objects; errors as ``read``."""
        first_HW = self._indices(expression, 0, size)
        return int(first_HW[first_HW != VOID].max(initial=0))

    def _indices(self, expression: Expression, frame: int, size: Size) -> np.ndarray:
        """(H, W) uint8."""
        self.open()
        return _read_png(self._file(expression, frame), frame_name(expression, frame), size)

    def _file(self, expression: Expression, frame: int) -> Path:
        return self.path / expression.video / f"{expression.frames[frame]}.png"


class FolderMasks(MaskStore):
    """Long-RVOS, ReasonVOS, Ref-YouTube-VOS valid: ``<folder>/<annotation id>/<frame>.png`` of 0 and 255.

    Args:
        name: of the dataset, for messages.
        path: of the folder of all masks.
        absent_is_empty: whether a frame without a file is one without the object (Long-RVOS), or one without truth.
    """

    def __init__(self, name: str, path: Path, absent_is_empty: bool):
        super().__init__(name, path)
        self.absent_is_empty = absent_is_empty

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``."""
        folders = [self.existing_folder(annotation_id, expression) for annotation_id in expression.annotation_ids]
        paths = [folder / f"{expression.frames[frame]}.png" for folder in folders]
        there = [path for path in paths if path.is_file() or not self.absent_is_empty]
        return [_read_foreground(path, frame_name(expression, frame), size) for path in there]

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: frames for which every object has a file, unless no file means no object."""
        is_annotated_T = super().annotated(expression)
        for annotation_id in expression.annotation_ids:
            folder = self.existing_folder(annotation_id, expression)
            if not self.absent_is_empty:
                there = {path.stem for path in folder.glob("*.png")}
                is_annotated_T &= [frame in there for frame in expression.frames]
        return is_annotated_T

    def num_unlisted(self, expression: Expression) -> int:
        """See ``MaskStore.num_unlisted``."""
        folders = [self.path / annotation_id for annotation_id in expression.annotation_ids]
        return sum(len({path.stem for path in folder.glob("*.png")} - {*expression.frames}) for folder in folders)

    def files(self, video: Video) -> list[list[Path]]:
        """See ``MaskStore.files``."""
        ids = dict.fromkeys(annotation_id for one in video for annotation_id in one.annotation_ids)
        paths = [[self.path / annotation_id / f"{frame}.png" for frame in video[0].frames] for annotation_id in ids]
        return [[path for path in of_one if path.is_file()] for of_one in paths]


def _read_png(path: Path, name: str, size: Size, modes: Sequence[str] = ("P", "L")) -> np.ndarray:
    """(H, W) of the numbers in a file of one of these PIL modes: uint8, bool for mode "1"."""
    if not path.is_file():
        raise FileNotFoundError(f"mask of {name} is missing; expected {path}")
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"mask of {name} does not decode: {path}: {error}") from error
    if mode not in modes:
        raise ValueError(f"mask of {name}: {path} has mode {mode}; expected palette or grey ({', '.join(modes)})")
    require_size(f"mask of {name}: {path}", values.shape, size)
    return values


def _read_foreground(path: Path, name: str, size: Size) -> np.ndarray:
    """(H, W) bool: what is not 0, as in the benchmarks' programs for scores.

    A file of small numbers only, such as 0/1 or object ids, is an error: it may be about something else.
    """
    values = _read_png(path, name, size, modes=("L", "P", "1"))
    if values.dtype == bool:
        return values
    if 0 < values.max(initial=0) < FOREGROUND:
        raise ValueError(f"mask of {name}: {path} has values up to {values.max()}; expected foreground of {FOREGROUND}")
    return values > 0
