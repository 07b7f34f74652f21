"""RefCOCO, RefCOCO+ and RefCOCOg: sentences about objects of COCO pictures, each read as a video of one frame.

``refs(unc).p`` (``refs(umd).p`` for RefCOCOg) is a Python 2 pickle: a list of ``{ann_id, image_id, split, sentences:
[{sent, sent_id}]}``; ``instances.json`` beside it names the pictures and holds the outlines.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from glus.config import DatasetConfig
from glus.data.masks import PackedMasks, Size, frame_name, runs_of
from glus.files import field, read_object, whole_number
from glus.types import Expression

log = logging.getLogger(__name__)

REFS = ("refs(unc).p", "refs(umd).p")
"""Names that the file of sentences has."""
SIBLINGS = ("refcoco", "refcoco+", "refcocog")
"""Folders of the three sets, side by side. They share pictures across their splits."""


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
    images = read_object(path).get("images")
    if not isinstance(images, list):
        raise ValueError(f"{path}: expected a list under 'images'")
    return {
        whole_number(image, "id", str(path)): Path(field(image, "file_name", str, str(path))).stem for image in images
    }


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


class PolygonMasks(PackedMasks):
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

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``; polygons as COCO's own library draws them. An object may have none."""
        found = []
        for annotation_id in expression.annotation_ids:
            (outline,) = self.entries(expression, annotation_id)
            if isinstance(outline, dict):
                name = f"mask of {frame_name(expression, frame)}, annotation {annotation_id} in {self.path}"
                found.append(runs_of(outline, size, name))
            elif outline:
                found.append(coco.decode(coco.merge(coco.frPyObjects(outline, *size))))
        return found


def _is_polygon(points: Any) -> bool:
    is_list = isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
    return is_list and all(isinstance(side, int | float) for side in points)
