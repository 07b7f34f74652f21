"""Ground-truth masks as the benchmarks store them, read as 0/1 arrays of the frames' size.

- ``RleMasks``: run-length codes in one JSON file, by annotation id;
- ``PaletteMasks``: a PNG per frame whose pixels are object ids;
- ``FolderMasks``: a folder per object or sentence, with a PNG of 0 and 255 per frame;
- ``PolygonMasks``, ``ShapeMasks``: outlines of pictures, each read as a video of one frame.

Pixels of a PNG are read as the numbers that the file holds. A conversion to colour or grey would lose them: OpenCV
turns the palette indices 0, 1, 2 of Ref-YouTube-VOS into 0, 38, 75.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from glus.data.benchmarks.reason_seg import Shape, read_reason_seg_file
from glus.data.mask_pack import MaskPack
from glus.data.rle import Size, decode_rle, encode_rle
from glus.files import field, read_object
from glus.types import Expression

VOID = 255
"""Palette index of pixels that belong to no object for sure (DAVIS)."""
FOREGROUND = 255
"""Value of an object's pixels in a file of its own."""
TARGET, IGNORED = 1, 255
"""Values of pixels when the shapes of ReasonSeg are drawn over each other."""


class MaskStore(ABC):
    """Where the masks of a split come from; it reads nothing before it is asked, and may be sent to other processes.

    Args:
        name: of the dataset, for messages.
        path: of the file or folder of its masks.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path

    def open(self) -> None:
        """Make sure that the masks are there; those in one file are packed, which can fail for all of them.

        Raises:
            FileNotFoundError: the file or folder is missing.
            ValueError, OSError: as ``MaskPack``.
        """
        if not self.path.exists():
            raise FileNotFoundError(
                f"dataset {self.name!r} has no masks at {self.path}; "
                "a split without public masks cannot be trained on or scored"
            )

    @abstractmethod
    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """The union of the expression's objects.

        Args:
            expression: without annotation ids the masks are empty.
            frames: F indices into ``expression.frames``.
            size: (H, W) of the frames; masks of another size are an error.

        Returns:
            (F, H, W) uint8 of 0/1.

        Raises:
            FileNotFoundError: the file with the masks is missing.
            ValueError: a mask has the wrong size, does not decode, or is not listed.
        """

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray | None:
        """Pixels whose truth is unknown: areas that ReasonSeg labels "ignore", void (255) of Ref-DAVIS17.

        A protocol that knows such pixels takes them out of prediction and truth before it counts anything. They are
        never part of what ``read`` returns. Ref-DAVIS17's protocol B scores as if there were none.

        Returns:
            (F, H, W) bool; None where the layout has no such pixels.

        Raises:
            FileNotFoundError, ValueError: as ``read``.
        """
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """Frames for which there is a truth, be it an empty mask; ``read`` may not be asked for others.

        All of them, but for masks that lie in one folder per object or sentence (ReasonVOS, Ref-YouTube-VOS valid),
        where only the frames with a file are (ReasonVOS' official script scores just these), and for a picture of
        ReasonSeg without outlines (two of test).

        Returns:
            (T,) bool.

        Raises:
            FileNotFoundError: the folder of the masks is missing.
        """
        return np.ones(len(expression.frames), bool)


# ------------------------------------------------------------------------------------- one file of annotations


class _PackedMasks(MaskStore):
    """Masks by annotation id in one JSON file, read through its packed copy, which each process opens itself."""

    @staticmethod
    def read_annotations(path: Path) -> dict[str, Any]:
        """What is packed: {annotation id: [entry per frame]}."""
        return read_object(path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pack"}

    @cached_property
    def pack(self) -> MaskPack:
        """All annotations; errors as ``open``."""
        super().open()
        return MaskPack(self.path, self.read_annotations)

    def open(self) -> None:
        """See ``MaskStore.open``."""
        len(self.pack)

    def _entries(self, expression: Expression, annotation_id: str) -> list[Any]:
        if annotation_id not in self.pack:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}")
        return self.pack[annotation_id]

    def _decode(self, code: dict[str, Any], size: Size, name: str) -> np.ndarray:
        """(H, W) uint8 of 0/1 of a run-length code."""
        try:
            return decode_rle(code["counts"], size)
        except ValueError as error:
            raise ValueError(f"mask of {name} in {self.path} does not decode: {error}") from error


class RleMasks(_PackedMasks):
    """MeViS: ``mask_dict.json``, {annotation id: [COCO run-length code or null per frame]}."""

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; overlapping objects are united, never summed."""
        union = np.zeros((len(frames), *size), np.uint8)
        for row, code, name in self._in_sight(expression, frames, size):
            union[row] |= self._decode(code, size, name)
        return union

    def codes(self, expression: Expression, frames: Sequence[int], size: Size) -> list[list[str]]:
        """The same masks as compressed run-length codes: for each frame, those of the objects in sight.

        The codes are of masks of ``size``, but are not decoded here: one may be corrupt.

        Raises:
            FileNotFoundError, ValueError: as ``read``.
        """
        codes: list[list[str]] = [[] for _ in frames]
        for row, code, name in self._in_sight(expression, frames, size):
            is_compressed = isinstance(code["counts"], str)
            codes[row].append(code["counts"] if is_compressed else encode_rle(self._decode(code, size, name)))
        return codes

    def _in_sight(
        self, expression: Expression, frames: Sequence[int], size: Size
    ) -> Iterator[tuple[int, dict[str, Any], str]]:
        """(row of ``frames``, code of ``size``, how to call it) of every mask there is; null is an absent object."""
        for annotation_id in expression.annotation_ids:
            entries = self._entries(expression, annotation_id)
            if len(entries) != len(expression.frames):
                raise ValueError(
                    f"masks of {expression.name}: annotation {annotation_id} in {self.path} has {len(entries)} "
                    f"entries; expected one for each of the video's {len(expression.frames)} frames"
                )
            for row, frame in enumerate(frames):
                match entries[frame]:
                    case None:
                        continue
                    case {"size": [*found], "counts": str() | list()} as code:
                        name = f"{_frame_name(expression, frame)}, annotation {annotation_id}"
                        _check_size(f"mask of {name} in {self.path}", found, size)
                        yield row, code, name
                    case other:
                        raise ValueError(
                            f"mask of {_frame_name(expression, frame)}, annotation {annotation_id} in {self.path}: "
                            f"expected null or {{size, counts}}, found {other!r:.80}"
                        )


class PolygonMasks(_PackedMasks):
    """RefCOCO: COCO's ``instances.json``, whose annotations are lists of polygons or a run-length code."""

    @staticmethod
    def read_annotations(path: Path) -> dict[str, Any]:
        """{annotation id: [its polygons or run-length code]}; ValueError names an annotation that is malformed."""
        found: dict[str, Any] = {}
        for index, annotation in enumerate(read_object(path).get("annotations", [])):
            where = f"{path}: annotations[{index}]"
            annotation_id, outline = str(field(annotation, "id", int, where)), annotation.get("segmentation")
            is_code = isinstance(outline, dict) and {"size", "counts"} <= outline.keys()
            if not is_code and not (isinstance(outline, list) and all(map(_is_polygon, outline))):
                raise ValueError(
                    f"{where}: expected polygons [[x, y, x, y, ...]] or {{size, counts}}, found {outline!r:.80}"
                )
            if annotation_id in found:
                raise ValueError(f"{path} lists annotation {annotation_id!r} twice")
            found[annotation_id] = [outline]
        return found

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; the parts of an object are united, and it may have none."""
        union = np.zeros(size, np.uint8)
        for annotation_id in expression.annotation_ids:
            (outline,) = self._entries(expression, annotation_id)
            union |= self._draw(outline, size, f"{_frame_name(expression, 0)}, annotation {annotation_id}")
        return np.repeat(union[None], len(frames), axis=0)

    def _draw(self, outline: Any, size: Size, name: str) -> np.ndarray:
        """(H, W) uint8 of 0/1; polygons as COCO's own library draws them."""
        if isinstance(outline, dict):
            _check_size(f"mask of {name} in {self.path}", outline["size"], size)
            return self._decode(outline, size, name)
        return coco.decode(coco.merge(coco.frPyObjects(outline, *size))) if outline else np.zeros(size, np.uint8)


def _is_polygon(points: Any) -> bool:
    is_list = isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
    return is_list and all(isinstance(side, int | float) for side in points)


# ------------------------------------------------------------------------------------------------- PNG files


class PaletteMasks(MaskStore):
    """Ref-YouTube-VOS train, Ref-DAVIS17: ``<folder>/<video>/<frame>.png``, whose pixels are object ids."""

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``."""
        masks = np.zeros((len(frames), *size), np.uint8)
        if expression.annotation_ids:
            values = [int(annotation_id) for annotation_id in expression.annotation_ids]
            for row, indices_HW in enumerate(self._indices(expression, frames, size)):
                masks[row] = np.isin(indices_HW, values)
        return masks

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.ignore``: pixels of value 255, of which Ref-YouTube-VOS has none."""
        return np.stack([indices_HW == VOID for indices_HW in self._indices(expression, frames, size)])

    def num_objects(self, expression: Expression, size: Size) -> int:
        """The largest id in the video's first frame, by which DAVIS counts a video's objects; errors as ``read``."""
        (first_HW,) = self._indices(expression, [0], size)
        return int(first_HW[first_HW != VOID].max(initial=0))

    def _indices(self, expression: Expression, frames: Sequence[int], size: Size) -> list[np.ndarray]:
        """F arrays (H, W) uint8."""
        self.open()
        folder = self.path / expression.video
        return [_read_png(folder / f"{expression.frames[i]}.png", _frame_name(expression, i), size) for i in frames]


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

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; overlapping objects are united."""
        union = np.zeros((len(frames), *size), np.uint8)
        for annotation_id in expression.annotation_ids:
            folder = self._folder(expression, annotation_id)
            for row, frame in enumerate(frames):
                path = folder / f"{expression.frames[frame]}.png"
                if path.is_file() or not self.absent_is_empty:
                    union[row] |= _read_foreground(path, _frame_name(expression, frame), size)
        return union

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: frames for which every object has a file, unless no file means no object."""
        is_annotated_T = super().annotated(expression)
        if not self.absent_is_empty:
            for annotation_id in expression.annotation_ids:
                there = {path.stem for path in self._folder(expression, annotation_id).glob("*.png")}
                is_annotated_T &= [frame in there for frame in expression.frames]
        return is_annotated_T

    def _folder(self, expression: Expression, annotation_id: str) -> Path:
        self.open()
        folder = self.path / annotation_id
        if not folder.is_dir():
            raise FileNotFoundError(f"masks of {expression.name} are missing; expected the folder {folder}")
        return folder


def _read_png(path: Path, name: str, size: Size, modes: Sequence[str] = ("P", "L")) -> np.ndarray:
    """(H, W) of the numbers in a file of one of these PIL modes: uint8, bool for mode "1"."""
    if not path.is_file():
        raise FileNotFoundError(f"mask of {name} is missing; expected {path}")
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask of {name} does not decode: {path}: {error}") from error
    if mode not in modes:
        raise ValueError(f"mask of {name}: {path} has mode {mode}; expected palette or grey ({', '.join(modes)})")
    _check_size(f"mask of {name}: {path}", values.shape, size)
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


# ------------------------------------------------------------------------------------------ ReasonSeg's shapes


class ShapeMasks(MaskStore):
    """ReasonSeg: ``<folder>/<id>.json``, whose shapes are targets or areas to be ignored."""

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``."""
        if not expression.annotation_ids:
            return np.zeros((len(frames), *size), np.uint8)
        shapes = self._shapes(expression)
        if not shapes:
            raise ValueError(f"masks of {expression.name}: {self.path / expression.video}.json has no outlines")
        is_target = draw_shapes(shapes, size) == TARGET
        return np.repeat(is_target[None].astype(np.uint8), len(frames), axis=0)

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.ignore``: what lies in a shape labelled "ignore" and in no smaller target."""
        is_ignored = draw_shapes(self._shapes(expression), size) == IGNORED
        return np.repeat(is_ignored[None], len(frames), axis=0)

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: whether the picture has outlines; without, it cannot be scored or trained on."""
        return np.array([bool(self._shapes(expression))])

    def _shapes(self, expression: Expression) -> list[Shape]:
        self.open()
        return read_reason_seg_file(self.path / f"{expression.video}.json").shapes


def draw_shapes(shapes: Sequence[Shape], size: Size) -> np.ndarray:
    """Shapes over each other, the largest first; each covers its inside and its outline (LISA's data_processing.py).

    Args:
        shapes: coordinates are cut to whole pixels.
        size: (H, W).

    Returns:
        (H, W) uint8: 0, ``TARGET`` or ``IGNORED``.
    """
    drawn = np.zeros((len(shapes), *size), np.uint8)
    for inside_HW, shape in zip(drawn, shapes, strict=True):
        points = [np.array(shape.points).astype(np.int32)]
        cv2.polylines(inside_HW, points, True, 1, 1)
        cv2.fillPoly(inside_HW, points, 1)
    picture = np.zeros(size, np.uint8)
    for index in np.argsort([int(inside_HW.sum()) for inside_HW in drawn])[::-1]:
        picture[drawn[index] > 0] = IGNORED if shapes[index].is_ignored else TARGET
    return picture


# -------------------------------------------------------------------------------------------------- messages


def by(size: Sequence[int]) -> str:
    """Height x width."""
    return "x".join(str(side) for side in size)


def _frame_name(expression: Expression, frame: int) -> str:
    return f"{expression.name}, frame {expression.frames[frame]}"


def _check_size(mask: str, found: Sequence[int], size: Size) -> None:
    if list(found) != list(size):
        raise ValueError(f"{mask} is {by(found)}, but the frame is {by(size)} (height x width)")
