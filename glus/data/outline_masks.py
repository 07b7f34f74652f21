"""Masks of pictures (videos of one frame) as outlines: COCO's polygons (RefCOCO) and ReasonSeg's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from glus.data.benchmarks.json_access import field
from glus.data.benchmarks.reason_seg import Shape, read_reason_seg_file
from glus.data.mask_pack import Code, MaskFile, iterate_members
from glus.data.mask_store import by, no_masks, place
from glus.data.rle import Size
from glus.types import Expression

TARGET, IGNORED = 1, 255
"""Values of pixels when the shapes of ReasonSeg are drawn over each other."""


class PolygonMasks:
    """RefCOCO: ``instances.json``, whose annotations are lists of polygons or a run-length code.

    Args:
        name: of the dataset, for messages.
        path: of the file.
    """

    def __init__(self, name: str, path: Path):
        self.file = MaskFile(name, path, iterate_outlines)

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; the parts of an object are united, and it may have none."""
        union = np.zeros(size, np.uint8)
        for annotation_id in expression.annotation_ids:
            outline = self.file.open_with(expression, annotation_id).entry(annotation_id, 0)
            union |= self._draw(outline, size, f"{place(expression, 0)}, annotation {annotation_id}")
        return np.repeat(union[None], len(frames), axis=0)

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> None:
        """See ``MaskStore.ignore``: COCO's objects have no such pixels."""
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: the one frame."""
        return np.ones(1, bool)

    def _draw(self, outline: Any, size: Size, name: str) -> np.ndarray:
        """(H, W) uint8 of 0/1; polygons as COCO's own library draws them."""
        if isinstance(outline, list):
            if not outline:
                return np.zeros(size, np.uint8)
            return coco.decode(coco.merge(coco.frPyObjects(outline, *size)))
        found, counts = (
            (outline.size, outline.counts) if isinstance(outline, Code) else (outline["size"], outline["counts"])
        )
        if list(found) != list(size):
            raise ValueError(
                f"mask of {name} in {self.file.path} is {by(found)}, but the picture is {by(size)} (height x width)"
            )
        return self.file.decode(counts, size, name)


def iterate_outlines(path: Path) -> Iterator[tuple[str, Any]]:
    """(annotation id, [its polygons or run-length code]) of every annotation of COCO's ``instances.json``.

    Raises:
        ValueError: an annotation is malformed; it is named.
    """
    for index, annotation in enumerate(dict(iterate_members(path)).get("annotations", [])):
        where = f"{path}: annotations[{index}]"
        outline = annotation.get("segmentation")
        is_code = isinstance(outline, dict) and {"size", "counts"} <= outline.keys()
        if not is_code and not (isinstance(outline, list) and all(_is_polygon(polygon) for polygon in outline)):
            raise ValueError(
                f"{where}: expected polygons [[x, y, x, y, ...]] or {{size, counts}}, found {outline!r:.80}"
            )
        yield str(field(annotation, "id", int, where)), [outline]


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


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(isinstance(side, int | float) for side in points)
    )
