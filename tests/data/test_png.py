"""Masks in PNG files: every kind is read as Pillow reads it, every damage is noticed."""

from __future__ import annotations

import io
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.data.predictions import GREY, PALETTE, SIGNATURE, Doubt, UnusablePrediction, decode_png, read_png


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def header(size: tuple[int, int], bit_depth: int = 8, colour_type: int = GREY, interlace: int = 0) -> bytes:
    height, width = (side.to_bytes(4, "big") for side in size)
    return chunk(b"IHDR", width + height + bytes([bit_depth, colour_type, 0, 0, interlace]))


def filtered(rows: np.ndarray, kinds: np.ndarray) -> bytes:
    """Each row of bytes after its filter (PNG specification, section 9), led by the filter's number."""
    above = np.zeros_like(rows[0])
    lines = []
    for row, kind in zip(rows, kinds, strict=True):
        left, upper_left = (np.concatenate([[0], line[:-1]]).astype(int) for line in (row, above))
        upper = above.astype(int)
        distances = np.abs(np.stack([left, upper, upper_left]) - (left + upper - upper_left))
        nearest = np.choose(distances.argmin(0), [left, upper, upper_left])
        predicted = [0 * left, left, upper, (left + upper) // 2, nearest][kind]
        lines.append(bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes())
        above = row
    return b"".join(lines)


def write(values: np.ndarray, kinds: np.ndarray, bit_depth: int = 8, colour_type: int = GREY, pieces: int = 1) -> bytes:
    """A PNG of (H, W) values with the given row filters and the pixels spread over several chunks."""
    bits = np.unpackbits(values[..., None].astype(np.uint8), axis=2)[..., 8 - bit_depth :]
    rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    compressed = zlib.compress(filtered(rows, kinds))
    cuts = np.linspace(0, len(compressed), pieces + 1, dtype=int)
    pixels = [chunk(b"IDAT", compressed[start:end]) for start, end in pairwise(cuts)]
    palette = [chunk(b"PLTE", bytes(3 * 2**bit_depth))] if colour_type == PALETTE else []  # black: only indices count
    return b"".join([SIGNATURE, header(values.shape, bit_depth, colour_type), *palette, *pixels, chunk(b"IEND", b"")])


@pytest.mark.parametrize("bit_depth", [1, 2, 4, 8])
@pytest.mark.parametrize("colour_type", [GREY, PALETTE])
def test_every_row_filter_is_undone(bit_depth: int, colour_type: int) -> None:
    rng = np.random.default_rng(bit_depth)
    for size in ((1, 1), (5, 7), (16, 16), (40, 33)):
        for density in (0, 0.05, 0.5, 1):
            values = rng.integers(1, 2**bit_depth, size, endpoint=False) if bit_depth > 1 else np.ones(size, int)
            values[rng.random(size) >= density] = 0
            values[size[0] // 2 :] = values[size[0] // 2]  # equal rows: 0 after filtering
            data = write(values, rng.integers(0, 5, size[0]), bit_depth, colour_type, pieces=3)
            assert (decode_png(data, size)[0] == (values != 0)).all()
            assert (np.asarray(Image.open(io.BytesIO(data))) != 0).tolist() == (values != 0).tolist()


def test_every_kind_of_png_is_understood(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((6, 9)) < 0.5
    grey = mask.astype(np.uint8)
    palette = Image.fromarray(grey * 2).convert("P")
    palette.putpalette([0, 0, 0] * 256)  # black in every colour: only the index counts
    images = {
        "one_bit": Image.fromarray(mask),
        "grey": Image.fromarray(grey),
        "grey16": Image.fromarray(grey.astype(np.uint16) * 256),
        "palette": palette,
        "rgb": Image.fromarray(np.stack([0 * grey, 0 * grey, grey], axis=2)),
        "rgba": Image.fromarray(np.stack([grey, grey, grey, 0 * grey + 255], axis=2)),
        "la": Image.fromarray(grey).convert("LA"),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        assert (read_png(tmp_path / f"{name}.png", (6, 9))[0] == mask).all(), name
    Image.fromarray(grey).save(tmp_path / "jpeg.png", format="JPEG")
    with pytest.raises(UnusablePrediction, match="not a readable PNG"):
        read_png(tmp_path / "jpeg.png", (6, 9))


def test_interlaced_pixels_are_put_in_their_place() -> None:
    passes = bytes([0, 255, 0, 0, 0, 0, 255])  # upper left; upper right; lower row
    pixels = chunk(b"IDAT", zlib.compress(passes))
    data = b"".join([SIGNATURE, header((2, 2), interlace=1), pixels, chunk(b"IEND", b"")])
    assert decode_png(data, (2, 2))[0].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_every_damage_is_noticed(mode: str) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 5:33] = 255
    file = io.BytesIO()
    Image.fromarray(mask).convert(mode).save(file, "PNG")
    data = file.getvalue()
    assert (decode_png(data, mask.shape)[0] == (mask > 0)).all()
    for position in range(data.index(b"IEND") - 4):
        for damaged in (data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :], data[:position]):
            with pytest.raises(UnusablePrediction, match=r"^is not a readable PNG"):
                decode_png(damaged, mask.shape)


def test_a_file_with_right_checksums_may_still_lack_pixels() -> None:
    size, kinds = (4, 6), np.zeros(4, int)
    values = np.ones(size, int)
    rows = filtered(values.astype(np.uint8), kinds)
    assert decode_png(write(values, kinds), size)[0].all()
    for pixels in (
        zlib.compress(rows[:-1]),
        zlib.compress(rows + b"\0"),
        zlib.compress(rows)[:-5],
        zlib.compress(b"\5" + rows[1:]),
        zlib.compress(bytes(10**7)),
        b"",
    ):
        data = b"".join([SIGNATURE, header(size), chunk(b"IDAT", pixels), chunk(b"IEND", b"")])
        with pytest.raises(UnusablePrediction, match="not a readable PNG"):
            decode_png(data, size)
    headless = b"".join([SIGNATURE, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])
    with pytest.raises(UnusablePrediction, match="not a readable PNG"):
        decode_png(headless, size)


def test_the_message_names_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "00000.png"
    with pytest.raises(UnusablePrediction, match=r"00000\.png is missing"):
        read_png(path, (4, 6))
    path.write_bytes(write(np.ones((4, 6), int), np.zeros(4, int)))
    with pytest.raises(UnusablePrediction, match=r"00000\.png is 4x6, but the video's frames are 6x4"):
        read_png(path, (6, 4))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnusablePrediction, match=r"00000\.png is not a readable PNG"):
        read_png(path, (4, 6))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([colours] * 3 + [alpha])


MASK = np.zeros((8, 9), np.uint8)
MASK[2:6, 3:8] = 255
SOFT = np.where(MASK > 0, 230, 12).astype(np.uint8)
EDGE = MASK.copy()
EDGE[2, 3:8] = 128
ALL = np.full_like(MASK, 255)


@pytest.mark.parametrize(
    ("pixels", "doubt"),
    [
        (MASK, None),
        (MASK // 255, None),
        (0 * MASK, None),
        (ALL, None),
        (MASK > 0, None),
        (MASK.astype(np.uint16) * 257, None),
        (np.dstack([MASK, 0 * MASK, MASK // 2]), None),
        (with_alpha(MASK, ALL), None),
        (with_alpha(MASK, MASK), None),
        (SOFT, Doubt.values),
        (EDGE, Doubt.values),
        (MASK // 255 + (SOFT > 12) * np.arange(9, dtype=np.uint8) % 2, Doubt.values),
        (SOFT.astype(np.uint16) * 257, Doubt.values),
        (np.dstack([SOFT, SOFT, MASK]), Doubt.values),
        (with_alpha(ALL, MASK), Doubt.alpha),
        (with_alpha(0 * MASK, MASK), Doubt.alpha),
    ],
)
def test_what_is_no_mask_of_two_values_is_doubted(pixels: np.ndarray, doubt: Doubt | None) -> None:
    assert decode_png(encoded(pixels), MASK.shape)[1] is doubt


def test_a_palette_that_was_made_anew_is_doubted() -> None:
    """It may have the object at 0, as Pillow's own conversion of a mask does."""
    image = Image.fromarray(MASK // 255, "P")
    for colours, doubt in (((0, 0, 0, 255, 255, 255), None), ((255, 255, 255, 0, 0, 0), Doubt.palette)):
        image.putpalette(colours)
        file = io.BytesIO()
        image.save(file, "PNG")
        assert decode_png(file.getvalue(), MASK.shape)[1] is doubt


@pytest.mark.parametrize("bit_depth", [2, 4])
def test_values_of_less_than_a_byte_are_doubted(bit_depth: int) -> None:
    kinds = np.zeros(len(MASK), int)
    assert decode_png(write(MASK // 255 * 3, kinds, bit_depth), MASK.shape)[1] is None
    assert decode_png(write(MASK // 255 + EDGE // 255, kinds, bit_depth), MASK.shape)[1] is Doubt.values
