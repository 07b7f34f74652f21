"""Outlines of pictures: drawn as their authors' code draws them, and their defects named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.benchmarks.outlines import Shape, draw_shapes
from glus.data.masks import MaskStore
from glus.types import Expression
from tests.edits import edit_json
from tests.layouts import SIZE
from tests.layouts.pictures import write_reason_seg, write_refcoco


def store_of(root: Path, edit: Callable[[Any], object]) -> tuple[MaskStore, Expression]:
    """RefCOCO's store with its annotations edited, and the first expression of val, about annotation 6."""
    dataset = write_refcoco(root / "refcoco", "val").dataset
    edit_json(root / "refcoco/instances.json", lambda content: edit(content["annotations"][4]))
    return open_masks(dataset), read_expressions(dataset)[0]


def test_polygons_are_drawn_and_united_as_by_coco(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    polygons = [np.round(rng.uniform(-3, 55, 2 * n), 2).tolist() for n in (3, 7, 12)]
    store, expression = store_of(tmp_path, lambda a: a.update(segmentation=polygons))
    parts = coco.decode(coco.frPyObjects(polygons, *SIZE))
    np.testing.assert_array_equal(store.read(expression, [0, 0], SIZE), [parts.max(2)] * 2)
    assert pickle.loads(pickle.dumps(store)).read(expression, [0], SIZE).any()


def test_compressed_codes_are_read_and_an_object_may_have_no_part(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random(SIZE) < 0.3
    code = coco.encode(np.asfortranarray(mask, np.uint8))
    compressed = {"size": list(SIZE), "counts": code["counts"].decode()}
    store, expression = store_of(tmp_path / "a", lambda a: a.update(segmentation=compressed))
    np.testing.assert_array_equal(store.read(expression, [0], SIZE), mask[None])
    store, expression = store_of(tmp_path / "b", lambda a: a.update(segmentation=[]))
    assert not store.read(expression, [0], SIZE).any()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), r"annotations\[4\]: expected polygons"),
        (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"annotations\[4\]: expected polygons"),
        (
            lambda a: a.update(segmentation={"size": [3, 4]}),
            r"annotations\[4\]: expected polygons .* or {size, counts}",
        ),
        (lambda a: a.pop("segmentation"), r"annotations\[4\]: expected .* found None"),
        (lambda a: a.update(image_id=99), r"annotations\[4\]: image_id 99 is not among 'images'"),
        (lambda a: a.update(id=7), r"instances.json lists annotation '7' twice"),
        (lambda a: a.update(id=77), r"refcoco/COCO_train2014_000000000003/12: .* has no annotation '6'"),
        (
            lambda a: a.update(segmentation={"size": [3, 4], "counts": [12]}),
            r"annotation 6 .* is 3x4, but the frame",
        ),
        (
            lambda a: a.update(segmentation={"size": list(SIZE), "counts": [12]}),
            r"COCO_train2014_000000000003/12, .*annotation 6 .* does not decode: its runs cover 12",
        ),
    ],
)
def test_a_bad_outline_is_named(tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    store, expression = store_of(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        store.read(expression, [0], SIZE)


def test_outlines_fit_pictures_of_their_size_only(tmp_path: Path) -> None:
    """They would be drawn on another part of a picture that was resized."""
    store, expression = store_of(tmp_path, lambda a: a)
    with pytest.raises(ValueError, match=r"annotation 6 in .*instances.json is 36x52, but the frame is 72x104"):
        store.read(expression, [0], (72, 104))


def draw_as_lisa(shapes: list[Shape]) -> np.ndarray:
    """One picture, painted over from the largest shape to the smallest."""
    areas = []
    for shape in shapes:
        alone = np.zeros(SIZE, np.uint8)
        cv2.polylines(alone, np.array([shape.points], np.int32), True, 1, 1)
        cv2.fillPoly(alone, np.array([shape.points], np.int32), 1)
        areas.append(alone.sum())
    picture = np.zeros(SIZE, np.uint8)
    for index in np.argsort(areas)[::-1]:
        value = 255 if shapes[index].is_ignored else 1
        cv2.polylines(picture, np.array([shapes[index].points], np.int32), True, value, 1)
        cv2.fillPoly(picture, np.array([shapes[index].points], np.int32), value)
    return picture


def test_shapes_are_drawn_as_by_lisa() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shapes = [
            Shape(rng.uniform(-5, 60, (int(rng.integers(1, 9)), 2)).tolist(), bool(rng.random() < 0.4))
            for _ in range(rng.integers(1, 6))
        ]
        np.testing.assert_array_equal(draw_shapes(shapes, SIZE), draw_as_lisa(shapes))


@pytest.mark.parametrize("points", [[[3, 4], [8, 4]], [[3, 4]]])
def test_a_shape_of_few_points_is_drawn(tmp_path: Path, points: list[list[int]]) -> None:
    """By LISA as a line or a pixel: one such shape is no reason to refuse the split."""
    dataset = write_reason_seg(tmp_path, "val").dataset
    shape = {"label": "target", "points": points}
    edit_json(tmp_path / "val/val_0.json", lambda content: content.update(shapes=[shape]))
    (mask_HW,) = open_masks(dataset).read(read_expressions(dataset)[0], [0], SIZE)
    np.testing.assert_array_equal(mask_HW, draw_as_lisa([Shape(points, False)]))
    assert mask_HW.sum() == (6 if len(points) == 2 else 1)


def test_a_picture_without_outlines_has_no_truth(tmp_path: Path) -> None:
    dataset = write_reason_seg(tmp_path, "test").dataset
    edit_json(tmp_path / "test/test_0.json", lambda content: content.update(shapes=[]))
    store, (without, other) = open_masks(dataset), read_expressions(dataset)
    assert not store.annotated(without).any()
    assert store.annotated(other).all()
    with pytest.raises(ValueError, match=r"reason_seg/test_0/0: .*test_0.json has no outlines"):
        store.read(without, [0], SIZE)
