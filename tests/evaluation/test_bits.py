"""J and F on packed bits equal the plain procedure to the last bit; packing loses nothing and refuses bad codes."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco

from glus.data.masks import unpack_runs
from glus.evaluation.packed import BitMasks, JFScores, compare
from tools.benchmark_scoring import plain_boundary_accuracy, plain_region_similarity

CASES_PER_SIZE = 240
SIZES = [
    *[(1, 1), (1, 7), (7, 1), (2, 2), (9, 13), (24, 32), (40, 130)],
    *[(63, 65), (64, 64), (65, 63), (127, 20), (128, 21), (129, 22), (191, 64), (193, 33)],  # around whole words
    *[(1, 1000), (1000, 1), (3, 1500), (1500, 2), (64, 640), (640, 65)],  # disks of 5 to 12 pixels
]
LARGE_SIZES = [(270, 480), (480, 270), (2, 8000), (8000, 2)]  # the last two: a disk of 65 pixels, more than a word


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise, a blob, a blob with noisy edges, thin lines, empty, full, one pixel, a box at the border, a hole."""
    mask = np.zeros((height, width), bool)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    match rng.integers(9):
        case 0:
            mask = rng.random((height, width)) < rng.choice([0.003, 0.03, 0.5, 0.97])
        case 1 | 2 as kind:
            y, x = np.mgrid[:height, :width]
            radii = rng.uniform(0.05, 0.5, 2) * (height, width) + 0.5
            distance = ((y - row) / radii[0]) ** 2 + ((x - column) / radii[1]) ** 2
            mask = distance < (1 if kind == 1 else rng.uniform(0.8, 1.2, (height, width)))
        case 3:
            mask[row, : column + 1] = mask[row:, column] = True
        case 4:
            pass
        case 5:
            mask[:] = True
        case 6:
            mask[row, column] = True
        case 7:
            mask[row:, : column + 1] = True
        case 8:
            mask[:] = True
            mask[row, column] = False
    return mask


def random_masks(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    return np.stack([random_mask(rng, *size) for _ in range(count)])


def code(mask: np.ndarray) -> bytes:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def plain_scores(prediction: np.ndarray, target: np.ndarray, void: np.ndarray) -> JFScores:
    frames = list(zip(prediction, target, void, strict=True))
    prediction, target = prediction & ~void, target & ~void
    return JFScores(
        j_T=np.array([plain_region_similarity(*frame) for frame in frames]),
        f_T=np.array([plain_boundary_accuracy(*frame) for frame in frames]),
        intersection_T=(prediction & target).sum((1, 2)),
        union_T=(prediction | target).sum((1, 2)),
        prediction_T=prediction.sum((1, 2)),
        target_T=target.sum((1, 2)),
    )


def assert_equal(scores: JFScores, expected: JFScores) -> None:
    for name, values in vars(expected).items():
        found = getattr(scores, name)
        assert found.dtype == values.dtype, name
        assert found.tolist() == values.tolist(), name


def check_random_cases(size: tuple[int, int], count: int) -> JFScores:
    """A third of the cases has void pixels; a third compares a mask with a shifted copy of itself."""
    rng = np.random.default_rng(size)
    prediction, target, void = (random_masks(rng, count, size) for _ in range(3))
    prediction[::3] = np.roll(target[::3], rng.integers(-3, 4, 2), (1, 2))
    void[np.arange(count) % 3 != 1] = False
    expected = plain_scores(prediction, target, void)
    assert_equal(compare(*(BitMasks.from_dense(masks) for masks in (prediction, target, void))), expected)
    return expected


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_random_cases_equal_the_plain_procedure(size: tuple[int, int]) -> None:
    expected = check_random_cases(size, CASES_PER_SIZE)
    assert CASES_PER_SIZE * len(SIZES) >= 5000
    if min(size) > 1:
        for scores in (expected.j_T, expected.f_T):
            assert np.isin([0, 1], scores).all()
    if min(size) > 8:
        assert all(len(np.unique(scores)) > CASES_PER_SIZE / 4 for scores in (expected.j_T, expected.f_T))


@pytest.mark.parametrize("size", LARGE_SIZES, ids=str)
def test_large_disks_equal_the_plain_procedure(size: tuple[int, int]) -> None:
    check_random_cases(size, 24 if min(size) > 2 else 4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_codes_pack_to_the_same_bits(size: tuple[int, int]) -> None:
    masks = random_masks(np.random.default_rng(size), 40, size)
    packed = BitMasks.from_dense(masks)
    assert packed.shape == masks.shape
    assert (packed.to_dense() == masks).all()
    runs = [[unpack_runs(code(mask), size)] for mask in masks]
    assert (BitMasks.united(runs, size).words_TWh == packed.words_TWh).all()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int64, np.float32])
def test_any_nonzero_pixel_of_any_layout_is_foreground(dtype: type) -> None:
    masks = random_masks(np.random.default_rng(0), 6, (70, 33))
    expected = BitMasks.from_dense(masks).words_TWh
    for value in (1, 2, -1, 255):
        pixels = masks.astype(dtype) * np.array(value).astype(dtype)
        assert (BitMasks.from_dense(pixels).words_TWh == expected).all()
    upside_down = BitMasks.from_dense(masks.astype(dtype)[::-1, ::-1])
    assert (upside_down.to_dense() == masks[::-1, ::-1]).all()
    by_columns = np.asfortranarray(masks.astype(dtype))
    assert (BitMasks.from_dense(by_columns).words_TWh == expected).all()


def test_masks_of_a_frame_are_united() -> None:
    size = (65, 20)
    first, second, third = random_masks(np.random.default_rng(4), 3, size)
    first[:30], third[5:40, 3:9] = True, True
    runs = [unpack_runs(counts, size) for counts in (code(first), code(second).decode(), code(third))]
    united = BitMasks.united([runs, [], [second]], size).to_dense()
    assert (united == np.stack([first | second | third, np.zeros(size, bool), second])).all()


def bad_codes() -> dict[str, tuple[bytes, str]]:
    good = code(np.eye(8, 9))
    text = "not a compressed run-length code"
    return {
        "short": (code(np.eye(8, 8)), "cover 64 pixels instead of 72"),
        "long": (code(np.eye(8, 10)), "cover 80 pixels instead of 72"),
        "cut between runs": (good[:-1], "pixels instead of 72"),
        "cut inside a run": (code(np.zeros((8, 9)))[:-1], text),
        "empty": (b"", text),
        "foreign character": (good[:2] + b" " + good[3:], text),
        "endless run": (b"o" * 40, text),
        "negative run": (b"1O" + good, text),
        "not ASCII": ("ä".encode(), text),
    }


@pytest.mark.parametrize("name", bad_codes())
def test_a_bad_code_is_refused(name: str) -> None:
    bad, reason = bad_codes()[name]
    with pytest.raises(ValueError, match=reason):
        unpack_runs(bad, (8, 9))


def test_frames_and_sizes_must_agree() -> None:
    masks, others = BitMasks.from_dense(np.zeros((2, 4, 5))), BitMasks.from_dense(np.zeros((2, 5, 4)))
    with pytest.raises(ValueError, match="expected two"):
        compare(masks, others)
    with pytest.raises(ValueError, match="void mask"):
        compare(masks, masks, others)
    with pytest.raises(ValueError, match=r"expected \(T, H, W\)"):
        BitMasks.from_dense(np.zeros((4, 5)))
    with pytest.raises(ValueError, match="at least 1x1"):
        BitMasks.united([[]], (0, 5))
    assert compare(*[BitMasks.from_dense(np.zeros((0, 4, 5)))] * 2).j_T.shape == (0,)
