"""Masks of pictures (videos of one frame) as outlines: COCO's polygons (RefCOCO) and ReasonSeg's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from glus.data.mask_store import by, no_masks, place
from glus.data.readers.json_access import field, read_json
from glus.data.readers.reason_seg import Shape, read_reason_seg_file
from glus.data.rle import Size, decode_rle
from glus.structures import Expression

TARGET, IGNORED = 1, 255
"""Values of pixels when the shapes of ReasonSeg are drawn over each other."""


class PolygonMasks:
    """RefCOCO: ``instances.json``, whose annotations are lists of polygons or a run-length code.

    The file is read on first use, once per process.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self._loaded: dict[str, Any] | None = None

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; the parts of an object are united, and it may have none."""
        union = np.zeros(size, np.uint8)
        for annotation_id in expression.annotation_ids:
            name = f"{place(expression, 0)}, annotation {annotation_id}"
            union |= self._draw(self._segmentation(expression, annotation_id), size, name)
        return np.repeat(union[None], len(frames), axis=0)

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> None:
        """See ``MaskStore.ignore``: COCO's objects have no such pixels."""
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: the one frame."""
        return np.ones(1, bool)

    def _segmentation(self, expression: Expression, annotation_id: str) -> Any:
        outlines = self.open()
        if annotation_id not in outlines:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}")
        return outlines[annotation_id]

    def open(self) -> dict[str, Any]:
        """Segmentation by annotation id.

        Raises:
            FileNotFoundError: there is no file of masks.
            ValueError: it is malformed.
        """
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> dict[str, Any]:
        """Segmentation by annotation id; polygons as arrays, which take a tenth of the memory of lists."""
        if not self.path.is_file():
            raise no_masks(self.name, self.path)
        found: dict[str, Any] = {}
        for index, annotation in enumerate(field(read_json(self.path), "annotations", list, str(self.path))):
            where = f"{self.path}: annotations[{index}]"
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, list):
                segmentation = [_polygon(points, where) for points in segmentation]
            elif not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
                raise ValueError(f"{where}: expected polygons or {{size, counts}}, found {segmentation!r:.80}")
            found[str(field(annotation, "id", int, where))] = segmentation
        return found

    def _draw(self, segmentation: Any, size: Size, name: str) -> np.ndarray:
        """(H, W) uint8 of 0/1; polygons as COCO's own library draws them."""
        if isinstance(segmentation, list):
            if not segmentation:
                return np.zeros(size, np.uint8)
            return coco.decode(coco.merge(coco.frPyObjects(segmentation, *size)))
        if list(segmentation["size"]) != list(size):
            raise ValueError(
                f"mask of {name} in {self.path} is {by(segmentation['size'])}, but the picture is {by(size)} "
                "(height x width)"
            )
        try:
            return decode_rle(segmentation["counts"], size)
        except ValueError as error:
            raise ValueError(f"mask of {name} in {self.path} does not decode: {error}") from error


class ShapeMasks:
    """ReasonSeg: ``<folder>/<id>.json``, whose shapes are targets or areas to be ignored."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``."""
        if not expression.annotation_ids:
            return np.zeros((len(frames), *size), np.uint8)
        shapes = self._shapes(expression)
        if not shapes:
            raise ValueError(f"masks of {expression.name}: {self._path(expression)} has no outlines")
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
        path = self._path(expression)
        if not path.is_file():
            raise no_masks(self.name, path)
        return read_reason_seg_file(path).shapes

    def _path(self, expression: Expression) -> Path:
        return self.folder / f"{expression.video}.json"


def draw_shapes(shapes: Sequence[Shape], size: Size) -> np.ndarray:
    """Shapes over each other, the largest first; each covers its inside and its outline (LISA's data_processing.py).

    Args:
        shapes: coordinates are cut to whole pixels.
        size: (H, W).

    Returns:
        (H, W) uint8: 0, ``TARGET`` or ``IGNORED``.
    """
    drawn = [_draw_one(shape, size) for shape in shapes]
    areas = [int(inside.sum()) for inside in drawn]
    picture = np.zeros(size, np.uint8)
    for index in np.argsort(areas)[::-1]:
        picture[drawn[index]] = IGNORED if shapes[index].is_ignored else TARGET
    return picture


def _draw_one(shape: Shape, size: Size) -> np.ndarray:
    """(H, W) bool."""
    inside = np.zeros(size, np.uint8)
    points = [np.array(shape.points).astype(np.int32)]
    cv2.polylines(inside, points, True, 1, 1)
    cv2.fillPoly(inside, points, 1)
    return inside.astype(bool)


def _polygon(points: Any, where: str) -> np.ndarray:
    """(2n,) float64: x, y, x, y, ..."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        raise ValueError(f"{where}: expected polygons [x, y, x, y, x, y, ...], found {points!r:.80}")
    return np.array(points, np.float64)
