"""PNG files as masks, without trusting any of them.

The usual kinds of mask (grey or palette indices of up to 8 bits, not interlaced) are inflated here and counted, which
no image library does: libpng and Pillow decode a file whose checksums are right but which has pixels too many. Every
other kind goes through Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from glus.data.compiled import njit
from glus.data.mask_store import by
from glus.data.rle import Size

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3
"""Colour types of the PNG specification whose pixels are single numbers."""
SUB, UP, AVERAGE, PAETH = 1, 2, 3, 4
"""Row filters of the PNG specification; 0 is none."""


class UnusablePrediction(Exception):
    """A prediction that cannot be scored; the message says what is wrong with which file."""


def read_png(path: Path, size: Size) -> np.ndarray:
    """A mask file as (H, W) bool, foreground where any colour channel is not 0.

    Reads every PNG (1-bit, grey, palette indices, colour; alpha is ignored) and trusts none: checksums are verified,
    since a damaged file can otherwise decode to a partly black mask.

    Raises:
        UnusablePrediction: the file is missing, does not decode, or is not of ``size`` (H, W).
    """
    try:
        return decode_png(path.read_bytes(), size)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UnusablePrediction(f"{path} {reason}") from error
    except UnusablePrediction as error:
        raise UnusablePrediction(f"{path} {error}") from error


def decode_png(data: bytes, size: Size) -> np.ndarray:
    """What ``read_png`` does with the bytes of a file.

    Raises:
        UnusablePrediction: they do not decode, or are not of ``size``; the message lacks the name of the file.
    """
    try:
        header, compressed = _read_chunks(data)
        width, height, bit_depth, colour_type, _, _, interlace = struct.unpack(">IIBBBBB", header)
        if (height, width) != tuple(size):
            raise UnusablePrediction(f"is {wrong_size((height, width), size)}")
        if colour_type in (GREY, PALETTE) and bit_depth <= 8 and not interlace:
            return _decode_rows(compressed, size, bit_depth)
        return _decode_with_pillow(data)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise UnusablePrediction("is not a readable PNG (damaged or cut short)") from error


def wrong_size(found: Size, expected: Size) -> str:
    """What is wrong with a mask of another size, to go after "is"."""
    return f"{by(found)}, but the video's frames are {by(expected)} (height x width)"


def _read_chunks(data: bytes) -> tuple[bytes, bytes]:
    """The header and the compressed pixels; ValueError unless every chunk up to the last is whole and unchanged."""
    if not data.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    chunks = {b"IHDR": b"", b"IDAT": b""}
    view, start = memoryview(data), len(SIGNATURE)
    while b"IEND" not in chunks:
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if end + 4 > len(data) or zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("a chunk is damaged or missing")
        kind = data[start + 4 : start + 8]
        chunks[kind] = chunks.get(kind, b"") + data[start + 8 : end]
        start = end + 4
    return chunks[b"IHDR"], chunks[b"IDAT"]


def _decode_rows(compressed: bytes, size: Size, bit_depth: int) -> np.ndarray:
    """(H, W) bool; ValueError or zlib.error unless there are exactly as many pixels as ``size`` says."""
    height, width = size
    row_bytes = -(-width * bit_depth // 8)
    expected = height * (1 + row_bytes)
    inflater = zlib.decompressobj()
    rows = inflater.decompress(compressed, expected + 1)
    if len(rows) != expected or not inflater.eof:
        raise ValueError(f"{len(rows)} bytes of pixels instead of {expected}")
    values_Hb = np.empty((height, row_bytes), np.uint8)
    if not _undo_filters(np.frombuffer(rows, np.uint8).reshape(height, 1 + row_bytes), values_Hb):
        raise ValueError("an unknown row filter")
    if bit_depth == 8:
        return values_Hb != 0
    bits = np.unpackbits(values_Hb, axis=1, count=width * bit_depth)
    return np.logical_or.reduce(bits.reshape(height, width, bit_depth), axis=2)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels: np.ndarray = np.asarray(image)
        num_colours = pixels.shape[2] - image.mode.endswith("A") if pixels.ndim == 3 else 1
    return pixels != 0 if pixels.ndim == 2 else np.logical_or.reduce(pixels[..., :num_colours], axis=2)


@njit(cache=True, nogil=True)
def _undo_filters(rows_Hb: np.ndarray, values_Hb: np.ndarray) -> bool:
    """Undo the filter that each row's first byte names, one byte a pixel (or several pixels); False if unknown."""
    above_b = np.zeros(values_Hb.shape[1], np.uint8)
    for row in range(rows_Hb.shape[0]):
        kind = rows_Hb[row, 0]
        if kind > PAETH:
            return False
        left, upper_left = 0, 0
        for x in range(above_b.size):
            upper = int(above_b[x])
            predicted = 0
            if kind == SUB:
                predicted = left
            elif kind == UP:
                predicted = upper
            elif kind == AVERAGE:
                predicted = (left + upper) // 2
            elif kind == PAETH:
                predicted = _nearest(left, upper, upper_left)
            left = (rows_Hb[row, 1 + x] + predicted) & 255
            values_Hb[row, x] = left
            upper_left = upper
        above_b = values_Hb[row]
    return True


@njit(nogil=True)
def _nearest(left: int, upper: int, upper_left: int) -> int:
    """Paeth's prediction: the neighbour that is nearest to left + upper - upper left."""
    to_left, to_upper = abs(upper - upper_left), abs(left - upper_left)
    to_upper_left = abs(left + upper - 2 * upper_left)
    if to_left <= to_upper and to_left <= to_upper_left:
        return left
    return upper if to_upper <= to_upper_left else upper_left
