"""Sentences about pictures, whose masks are outlines: RefCOCO, RefCOCO+, RefCOCOg and ReasonSeg.

Each picture is read as a video of one frame.

- RefCOCO: ``refs(unc).p`` (``refs(umd).p`` for RefCOCOg) is a Python 2 pickle, a list of ``{ann_id, image_id, split,
  sentences: [{sent, sent_id}]}``; ``instances.json`` beside it names the pictures of COCO and holds the outlines.
- ReasonSeg: ``<split>/<id>.json`` is ``{"text": [...], "is_sentence": bool, "shapes": [{"label": ..., "points": [[x,
  y], ...]}]}`` beside ``<id>.jpg``; some files are in cp1252.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from glus.config import DatasetConfig
from glus.data.masks import MaskStore, RleMasks, Size
from glus.files import field, read_json, read_object, whole_number
from glus.types import Expression

log = logging.getLogger(__name__)

REFS = ("refs(unc).p", "refs(umd).p")
"""Names that the file of sentences has."""
SIBLINGS = ("refcoco", "refcoco+", "refcocog")
"""Folders of the three sets, side by side. They share pictures across their splits."""
TARGET, IGNORED = 1, 255
"""Values of pixels when the shapes of a picture are drawn over each other."""


def read_refcoco(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """One expression per sentence, its id the ``sent_id``; pictures in the file's order.

    Pictures of ``train`` that belong to val or test in any of the three sets are left out: a model that was trained on
    them could not be tested there. The number is logged.

    Raises:
        FileNotFoundError: no ``instances.json``.
        ValueError: a file is malformed, or has no such split.
    """
    refs = list(_read_refs(path))
    chosen = [ref for ref in refs if ref["split"] == dataset.split]
    if not chosen:
        known = ", ".join(sorted({ref["split"] for ref in refs}))
        raise ValueError(f"{path} has no split {dataset.split!r}; it has {known or 'nothing'}")
    held_out = _held_out_images(dataset, path) if dataset.split == "train" else set()
    kept = [ref for ref in chosen if ref["image_id"] not in held_out]
    if len(kept) < len(chosen):
        log.info("%s: %d of %d objects lie in val or test pictures", dataset.name, len(chosen) - len(kept), len(chosen))
    pictures = _picture_names(masks)
    by_picture: dict[str, list[Expression]] = {}
    for ref in kept:
        if ref["image_id"] not in pictures:
            raise ValueError(f"{path}: image_id {ref['image_id']} is not in {masks}")
        picture = pictures[ref["image_id"]]
        by_picture.setdefault(picture, []).extend(_expressions(dataset, picture, ref, path))
    return [e for group in by_picture.values() for e in sorted(group, key=lambda e: int(e.exp_id))]


def _expressions(dataset: DatasetConfig, picture: str, ref: dict[str, Any], path: Path) -> Iterator[Expression]:
    annotation = int(ref["ann_id"])
    for sentence in ref["sentences"]:
        where = f"{path}: a sentence of annotation {annotation}"
        exp_id = str(whole_number(sentence, "sent_id", where))
        text = field(sentence, "sent", str, where)
        yield Expression(dataset.name, picture, exp_id, text, (picture,), (annotation,), (str(annotation),))


def _picture_names(path: Path) -> dict[int, str]:
    """File names without suffix, by image id; those in the pickle have another ending."""
    if not path.is_file():
        raise FileNotFoundError(f"the file that names the pictures is missing; expected {path}")
    images, where = field(read_json(path), "images", list, str(path)), f"{path}: an entry of images"
    return {whole_number(image, "id", where): Path(field(image, "file_name", str, where)).stem for image in images}


def _held_out_images(dataset: DatasetConfig, path: Path) -> set[int]:
    """Images of val and test of all sets that are there."""
    folders = [path.parent, *(path.parent.parent / name for name in SIBLINGS if name != path.parent.name)]
    found: set[int] = set()
    for folder in folders:
        files = [folder / name for name in REFS if (folder / name).is_file()]
        if not files:
            log.warning("%s: %s is not there; its val and test pictures may be trained on", dataset.name, folder)
        for file in files:
            found |= {ref["image_id"] for ref in _read_refs(file) if ref["split"] != "train"}
    return found


def _read_refs(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a pickle, their fields checked."""
    try:
        refs = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a pickle of plain data: {error}") from error
    if not isinstance(refs, list):
        raise ValueError(f"{path}: expected a list of references, found a {type(refs).__name__}")
    for index, ref in enumerate(refs):
        where = f"{path}[{index}]"
        field(ref, "split", str, where)
        field(ref, "sentences", list, where)
        ids = {key: whole_number(ref, key, where) for key in ("ann_id", "image_id")}
        yield {**ref, **ids}


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, numbers and text only: a pickle that names any class or function is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, but plain data need no code")


class PolygonMasks(RleMasks):
    """RefCOCO: COCO's ``instances.json``, whose annotations are lists of polygons or a run-length code."""

    @staticmethod
    def read_annotations(path: Path) -> dict[str, Any]:
        """{annotation id: [its run-length code]}, null for an object without parts; polygons are drawn as COCO's own
        library draws them, at the size that the file gives the picture.

        Raises:
            ValueError: an annotation, which is named, is malformed.
        """
        content = read_object(path)
        sizes = dict(_picture_sizes(path, content.get("images", [])))
        found: dict[str, Any] = {}
        for index, annotation in enumerate(content.get("annotations", [])):
            where = f"{path}: annotations[{index}]"
            annotation_id, outline = str(field(annotation, "id", int, where)), annotation.get("segmentation")
            is_code = isinstance(outline, dict) and {"size", "counts"} <= outline.keys()
            if not is_code and not (isinstance(outline, list) and all(map(_is_polygon, outline))):
                raise ValueError(
                    f"{where}: expected polygons [[x, y, x, y, ...]] or {{size, counts}}, found {outline!r:.80}"
                )
            if annotation_id in found:
                raise ValueError(f"{path} lists annotation {annotation_id!r} twice")
            image_id = whole_number(annotation, "image_id", where)
            if image_id not in sizes:
                raise ValueError(f"{where}: image_id {image_id} is not among 'images'")
            found[annotation_id] = [outline if is_code else _draw(outline, sizes[image_id])]
        return found


def _picture_sizes(path: Path, images: list[Any]) -> Iterator[tuple[int, Size]]:
    """Image ids and their sizes."""
    for index, image in enumerate(images):
        number, *size = (whole_number(image, key, f"{path}: images[{index}]") for key in ("id", "height", "width"))
        yield number, (size[0], size[1])


def _draw(polygons: list[list[float]], size: Size) -> dict[str, Any] | None:
    """The union as a run-length code."""
    if not polygons:
        return None
    code = coco.merge(coco.frPyObjects(polygons, *size))
    return {"size": list(size), "counts": code["counts"].decode("ascii")}


def _is_polygon(points: Any) -> bool:
    is_list = isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
    return is_list and all(isinstance(side, int | float) for side in points)


# ------------------------------------------------------------------------------------------------- ReasonSeg


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
        ValueError: a field is missing or of another type, or an outline has no points.
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
    if not points or not all(_is_point(point) for point in points):
        raise ValueError(f"{where}: expected points [x, y], found {points!r:.80}")
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

    So one of two points is a line, and one of a single point that pixel.

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
