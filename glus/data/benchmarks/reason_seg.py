"""ReasonSeg: one JSON file per picture, each picture read as a video of one frame.

``<split>/<id>.json`` is ``{"text": [...], "is_sentence": bool, "shapes": [{"label": ..., "points": [[x, y], ...]}]}``
beside ``<id>.jpg``; some files are in cp1252.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.files import field, read_json
from glus.types import Expression


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
