"""ReasonSeg: one JSON file per picture, each picture read as a video of one frame.

``<split>/<id>.json`` is ``{"text": [...], "is_sentence": bool, "shapes": [{"label": ..., "points": [[x, y], ...]}]}``
beside ``<id>.jpg``; some files are in cp1252.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glus.config import DatasetConfig
from glus.data.masks import MaskStore, Size
from glus.files import field, read_json
from glus.types import Expression

TARGET, IGNORED = 1, 255
"""Values of pixels when the shapes of a picture are drawn over each other."""


@dataclass(frozen=True)
class Shape:
    """One outline."""

    points: list[list[float]]
    """x and y in pixels."""
    is_ignored: bool
    """Whether its inside is left out of scores."""


@dataclass(frozen=True)
class ReasonSegFile:
    """What a file says about its picture."""

    texts: list[str]
    is_sentence: bool
    """A whole sentence ("long query"), or a phrase ("short query")."""
    shapes: list[Shape]
    """In the file's order, without the deprecated ones labelled "flag"."""


def read_reason_seg(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """In ``train`` every text of a picture is an expression; elsewhere the first, which alone is scored (LISA).

    The group is ``long`` or ``short``, under which LISA reports.

    Args:
        dataset: the split.
        path: folder of its files, which also hold the masks.

    Raises:
        ValueError: a file is malformed or has no text.
    """
    expressions = []
    for file in sorted(path.glob("*.json")):
        content = read_reason_seg_file(file)
        texts = content.texts if dataset.split == "train" else content.texts[:1]
        group = "long" if content.is_sentence else "short"
        expressions += [
            Expression(dataset.name, file.stem, str(number), text, (file.stem,), (0,), (file.stem,), group)
            for number, text in enumerate(texts)
        ]
    return expressions


def read_reason_seg_file(path: Path) -> ReasonSegFile:
    """One file, in UTF-8 or cp1252.

    Raises:
        ValueError: a field is missing or of another type, or an outline has fewer than three points.
    """
    content = read_json(path, encodings=("utf-8", "cp1252"))
    texts = field(content, "text", list, str(path))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: expected sentences under 'text', found {texts!r:.80}")
    shapes = [
        _shape(value, f"{path}: shapes[{i}]") for i, value in enumerate(field(content, "shapes", list, str(path)))
    ]
    is_sentence = field(content, "is_sentence", bool, str(path))
    return ReasonSegFile(texts, is_sentence, [shape for shape in shapes if shape is not None])


def _shape(value: Any, where: str) -> Shape | None:
    """None for "flag", a deprecated label without meaning."""
    label, points = field(value, "label", str, where), field(value, "points", list, where)
    if label.lower() == "flag":
        return None
    if len(points) < 3 or not all(_is_point(point) for point in points):
        raise ValueError(f"{where}: expected at least three points [x, y], found {points!r:.80}")
    return Shape(points, "ignore" in label.lower())


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(isinstance(side, int | float) for side in point)


class ShapeMasks(MaskStore):
    """ReasonSeg: ``<folder>/<id>.json``, whose shapes are targets or areas to be ignored."""

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``."""
        if not expression.annotation_ids:
            return []
        shapes = self._shapes(expression)
        if not shapes:
            raise ValueError(f"masks of {expression.name}: {self.path / expression.video}.json has no outlines")
        return [draw_shapes(shapes, size) == TARGET]

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
