"""Pictures: right places, right colours, right sizes."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from glus.painter import PAPER, SENTENCE_COLOURS, Painter, overlay, palette
from glus.pictures import fit, legend, strip, write_movie

GREY = np.full((40, 60, 3), 100, np.uint8)


def boxes() -> np.ndarray:
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 6:26, 6:26] = True
    masks[1, 10:30, 36:56] = True
    return masks


def test_overlay_colours_the_inside_of_each_mask_and_nothing_else():
    picture = overlay(GREY, boxes(), palette(2))
    assert picture.shape == GREY.shape
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[15, 15], np.round(100 + 0.45 * (np.array(SENTENCE_COLOURS[0]) - 100.0)))
    np.testing.assert_array_equal(picture[20, 45], np.round(100 + 0.45 * (np.array(SENTENCE_COLOURS[1]) - 100.0)))
    np.testing.assert_array_equal(picture[6, 15], SENTENCE_COLOURS[0])
    np.testing.assert_array_equal(picture[10, 45], SENTENCE_COLOURS[1])
    np.testing.assert_array_equal(picture[35:, :], GREY[35:, :])
    assert (GREY == 100).all(), "the frame itself is left alone"


def test_both_of_two_equal_masks_are_seen():
    masks = boxes()[[0, 0]]
    picture = Painter(["1", "2"], palette(2)).draw(GREY, masks).reshape(-1, 3)
    for colour in SENTENCE_COLOURS[:2]:
        assert (picture == colour).all(1).any()


def test_overlay_without_masks_is_the_frame():
    np.testing.assert_array_equal(overlay(GREY, np.zeros((0, 40, 60), bool), []), GREY)
    np.testing.assert_array_equal(overlay(GREY, np.zeros((1, 40, 60), bool), palette(1)), GREY)


def test_colours_are_distinct():
    assert len(set(palette(28))) == 28
    assert palette(30)[28:] == palette(2), "numbers tell them apart"


@pytest.mark.parametrize("long_side", [180, 30])
def test_fit_keeps_masks_in_place(long_side):
    masks = boxes()
    frame, scaled = fit(GREY, masks, long_side)
    assert frame.shape == (long_side * 2 // 3, long_side, 3)
    assert scaled.shape == (2, *frame.shape[:2])
    np.testing.assert_allclose(scaled.mean((1, 2)), masks.mean((1, 2)), rtol=0.1)
    scale = long_side / 60
    for mask, was in zip(scaled, masks, strict=True):
        np.testing.assert_allclose(np.argwhere(mask).mean(0), (np.argwhere(was).mean(0) + 0.5) * scale - 0.5, atol=1)


def test_legend_wraps_long_sentences():
    short, long = (legend([text], palette(1), 200) for text in ("a cat", "a cat that is " + "very " * 30 + "black"))
    assert short.shape[1] == long.shape[1] == 200
    assert long.shape[0] > 3 * short.shape[0]
    assert (short == SENTENCE_COLOURS[0]).all(-1).sum() > 100
    assert (long[:, -4:] == PAPER).all(), "no word runs over the edge"


def test_strip_has_a_column_per_frame_and_a_row_per_source():
    masks = np.stack([boxes()[0]] * 3)
    empty = np.zeros_like(masks)
    both = strip("a box", ["1", "2", "3"], [GREY] * 3, {"ground truth": masks, "prediction": empty}, long_side=120)
    one = strip("a box", ["1", "2", "3"], [GREY] * 3, {"prediction": empty}, long_side=120)
    assert both.shape[1] == one.shape[1] == 3 * 120 + 2 * 6
    assert both.shape[0] > one.shape[0] + 80
    coloured = (both == SENTENCE_COLOURS[0]).all(-1)
    coloured[:30] = False  # the legend
    assert coloured[: both.shape[0] // 2].any()
    assert not coloured[both.shape[0] // 2 :].any()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("size", [(33, 47), (64, 48)])
def test_movies_hold_every_frame(tmp_path: Path, suffix: str, size: tuple[int, int]):
    path = tmp_path / "new" / f"movie{suffix}"
    levels = [40, 120, 200, 80]
    frames = [np.full((*size, 3), level, np.uint8) for level in levels]
    frames[2] = np.full((size[0] * 2, size[1] * 2, 3), levels[2], np.uint8)  # a frame of another size
    write_movie(path, iter(frames), 4)
    decoded = read_movie(path)
    assert decoded.shape == (4, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    np.testing.assert_allclose(decoded.mean((1, 2, 3)), levels, atol=6)


def read_movie(path: Path) -> np.ndarray:
    if path.suffix == ".gif":
        with Image.open(path) as image:
            assert image.info["duration"] == 250
            return np.stack([np.array(seek(image, number).convert("RGB")) for number in range(image.n_frames)])
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["fps"] == 4
    width, height = meta["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_gifs_keep_the_colours_of_the_legend(tmp_path: Path):
    noise = np.random.default_rng(0).integers(60, 140, (200, 200, 3), dtype=np.uint8)
    frame = np.concatenate([noise, legend(["a cat"], palette(1), 200)])
    write_movie(tmp_path / "movie.gif", [frame, frame[::-1]], 4)
    decoded = read_movie(tmp_path / "movie.gif")[0, : len(frame)].astype(int)
    square = (frame == SENTENCE_COLOURS[0]).all(-1)
    np.testing.assert_allclose(decoded[square], np.broadcast_to(SENTENCE_COLOURS[0], (square.sum(), 3)), atol=8)


def seek(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    return image


def test_unknown_kind_of_movie(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif"):
        write_movie(tmp_path / "movie.avi", [GREY], 4)


def test_a_movie_that_ffmpeg_cannot_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "false")  # ends at once, with an error
    with pytest.raises(OSError, match=r"cannot write movie .*movie.mp4: ffmpeg exit 1 \(.* MiB free\)"):
        write_movie(tmp_path / "movie.mp4", [GREY] * 9, 4)
