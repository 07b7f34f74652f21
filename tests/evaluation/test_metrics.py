"""J and F, and the plain procedure they are tested by, against the definition written down with sets of pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glus.evaluation.packed import boundary_accuracy, boundary_radius, region_similarity
from tools.benchmark_scoring import plain_boundary_accuracy, plain_region_similarity


def defined_boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    """Pixels whose value differs from the right, lower or lower right neighbour inside the image."""
    height, width = mask.shape
    return {
        (y, x)
        for y in range(height)
        for x in range(width)
        for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1))
        if v < height and u < width and mask[y, x] != mask[v, u]
    }


def defined_scores(prediction: np.ndarray, target: np.ndarray, void: np.ndarray | None = None) -> tuple[float, float]:
    """J and F of one frame from sets of pixels."""
    keep = np.ones(target.shape, bool) if void is None else void == 0
    prediction, target = (prediction != 0) & keep, (target != 0) & keep
    union = int((prediction | target).sum())
    j = int((prediction & target).sum()) / union if union else 1.0

    radius = math.ceil(0.008 * float(np.linalg.norm(target.shape)))
    ours, theirs = defined_boundary(prediction), defined_boundary(target)

    offsets = range(-radius, radius + 1)
    disk = [(dy, dx) for dy in offsets for dx in offsets if dy * dy + dx * dx <= radius * radius]

    def matched(points: set[tuple[int, int]], others: set[tuple[int, int]]) -> int:
        return len(points & {(y + dy, x + dx) for y, x in others for dy, dx in disk})

    if not ours or not theirs:
        return j, float(len(ours) == len(theirs))
    precision, recall = matched(ours, theirs) / len(ours), matched(theirs, ours) / len(theirs)
    return j, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def special_masks(height: int, width: int) -> dict[str, np.ndarray]:
    masks = {name: np.zeros((height, width), np.uint8) for name in ("empty", "corner", "last", "row", "column", "box")}
    masks["full"] = np.ones((height, width), np.uint8)
    masks["corner"][0, 0] = 1
    masks["last"][-1, -1] = 1
    masks["row"][-1, :] = 1
    masks["column"][:, -1] = 1
    masks["box"][height // 4 : height // 2, width // 3 :] = 1
    masks["hole"] = masks["full"].copy()
    masks["hole"][height // 2, width // 2] = 0
    return masks


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    centre = rng.uniform(-0.1, 1.1, 2) * (height, width)
    radii = rng.uniform(0.05, 0.5, 2) * (height, width)
    return (((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1).astype(np.uint8)


def check(prediction: np.ndarray, target: np.ndarray, void: np.ndarray | None = None) -> None:
    void_T = None if void is None else void[None]
    j, f = defined_scores(prediction, target, void)
    assert region_similarity(prediction[None], target[None], void_T)[0] == j
    assert boundary_accuracy(prediction[None], target[None], void_T)[0] == f
    frame = prediction != 0, target != 0, np.zeros(target.shape, bool) if void is None else void != 0
    assert (plain_region_similarity(*frame), plain_boundary_accuracy(*frame)) == (j, f)


@pytest.mark.parametrize("size", [(9, 13), (1, 7), (1, 1), (40, 130)])
def test_special_masks_equal_the_definition(size: tuple[int, int]) -> None:
    masks = special_masks(*size)
    for prediction in masks.values():
        for target in masks.values():
            check(prediction, target)


@pytest.mark.parametrize("size", [(24, 32), (75, 100), (60, 151)])
def test_random_masks_equal_the_definition(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for density in (0.003, 0.03, 0.5):
        prediction, target = ((rng.random(size) < density).astype(np.uint8) for _ in range(2))
        void = (rng.random(size) < 0.1).astype(np.uint8)
        check(prediction, target)
        check(prediction, target, void)
    for _ in range(8):
        prediction, target, void = (blob(rng, *size) for _ in range(3))
        check(prediction, target)
        check(prediction, target, void)


def test_known_quirks() -> None:
    empty, full = np.zeros((1, 20, 30)), np.ones((1, 20, 30))
    pixel = empty.copy()
    pixel[0, 3, 4] = 1
    assert (region_similarity(empty, empty)[0], boundary_accuracy(empty, empty)[0]) == (1.0, 1.0)
    assert (region_similarity(pixel, empty)[0], boundary_accuracy(pixel, empty)[0]) == (0.0, 0.0)
    assert (region_similarity(empty, full)[0], boundary_accuracy(empty, full)[0]) == (0.0, 1.0)
    assert boundary_accuracy(full, pixel)[0] == 0.0
    sizes = [(360, 640), (480, 854), (480, 910), (720, 1280), (1080, 1920), (75, 100)]
    assert [boundary_radius(*size) for size in sizes] == [6, 8, 9, 12, 18, 1]


def test_frames_are_independent_and_any_nonzero_is_foreground() -> None:
    rng = np.random.default_rng(1)
    prediction, target = (np.stack([blob(rng, 20, 30) for _ in range(5)]) for _ in range(2))
    for measure in (region_similarity, boundary_accuracy):
        scores = measure(prediction, target)
        assert scores.shape == (5,)
        assert scores.dtype == np.float64
        assert all(measure(prediction[t : t + 1], target[t : t + 1])[0] == scores[t] for t in range(5))
        for other in (prediction * 255, prediction * 2, prediction.astype(bool), -1.0 * prediction):
            assert (measure(other, target) == scores).all()
        assert measure(prediction[:0], target[:0]).shape == (0,)


def test_shapes_must_agree() -> None:
    for measure in (region_similarity, boundary_accuracy):
        with pytest.raises(ValueError, match="expected two"):
            measure(np.zeros((1, 4, 5)), np.zeros((1, 5, 4)))
        with pytest.raises(ValueError, match=r"expected \(T, H, W\), got \(4, 5\)"):
            measure(np.zeros((4, 5)), np.zeros((4, 5)))
        with pytest.raises(ValueError, match="void mask"):
            measure(np.zeros((1, 4, 5)), np.zeros((1, 4, 5)), np.zeros((2, 4, 5)))
