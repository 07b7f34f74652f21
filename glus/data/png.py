"""PNG files as masks, several times faster than through an image library, and without trusting any of them.

The usual kinds of mask (grey or palette indices of up to 8 bits, not interlaced) are decoded here: Python's zlib undoes
the compression, a kernel the row filters (PNG specification, section 9). Every other PNG goes through Pillow.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit
from PIL import Image

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
        data = path.read_bytes()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UnusablePrediction(f"{path} {reason}") from error
    try:
        return decode_png(data, size)
    except UnusablePrediction as error:
        raise UnusablePrediction(f"{path} {error}") from error


def decode_png(data: bytes, size: Size) -> np.ndarray:
    """What ``read_png`` does with the bytes of a file.

    Raises:
        UnusablePrediction: they do not decode, or are not of ``size``; the message lacks the name of the file.
    """
    try:
        header, compressed = _read_chunks(data)
        if header.size != tuple(size):
            raise UnusablePrediction(f"is {wrong_size(header.size, size)}")
        if header.colour_type in (GREY, PALETTE) and header.bit_depth <= 8 and not header.is_interlaced:
            return _decode_rows(header, compressed)
        return _decode_with_pillow(data)
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise UnusablePrediction("is not a readable PNG (damaged or cut short)") from error


def wrong_size(found: Size, expected: Size) -> str:
    """What is wrong with a mask of another size, to go after "is"."""
    found_text, expected_text = (f"{height}x{width}" for height, width in (found, expected))
    return f"{found_text}, but the video's frames are {expected_text} (height x width)"


@dataclass(frozen=True)
class _Header:
    size: Size
    bit_depth: int
    colour_type: int
    is_interlaced: bool


def _read_chunks(data: bytes) -> tuple[_Header, bytes]:
    """The header and the compressed pixels; ValueError unless every chunk up to the last is whole and unchanged."""
    if not data.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    header, pieces, view, start = None, [], memoryview(data), len(SIGNATURE)
    while True:
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if end + 4 > len(data) or zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("a chunk is damaged or missing")
        kind, content = view[start + 4 : start + 8], view[start + 8 : end]
        start = end + 4
        if header is None:
            header = _read_header(kind, content)
        elif kind == b"IDAT":
            pieces.append(content)
        elif kind == b"IEND":
            return header, b"".join(pieces)


def _read_header(kind: memoryview, content: memoryview) -> _Header:
    if kind != b"IHDR" or len(content) != 13:
        raise ValueError("no header")
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (0, 4))
    bit_depth, colour_type, _, _, interlace = content[8:]
    return _Header((height, width), bit_depth, colour_type, interlace != 0)


def _decode_rows(header: _Header, compressed: bytes) -> np.ndarray:
    """(H, W) bool; ValueError or zlib.error unless there are exactly as many pixels as the header says."""
    height, width = header.size
    row_bytes = -(-width * header.bit_depth // 8)
    expected = height * (1 + row_bytes)
    inflater = zlib.decompressobj()
    rows = inflater.decompress(compressed, expected + 1)
    if len(rows) != expected or not inflater.eof:
        raise ValueError(f"{len(rows)} bytes of pixels instead of {expected}")
    values_Hb = np.empty((height, row_bytes), np.uint8)
    if not _undo_filters(np.frombuffer(rows, np.uint8).reshape(height, 1 + row_bytes), values_Hb):
        raise ValueError("an unknown row filter")
    if header.bit_depth == 8:
        return values_Hb != 0
    bits = np.unpackbits(values_Hb, axis=1, count=width * header.bit_depth)
    return np.logical_or.reduce(bits.reshape(height, width, header.bit_depth), axis=2)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    Image.open(io.BytesIO(data), formats=["PNG"]).verify()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels: np.ndarray = np.asarray(image)
        num_colours = pixels.shape[2] - image.mode.endswith("A") if pixels.ndim == 3 else 1
    return pixels != 0 if pixels.ndim == 2 else np.logical_or.reduce(pixels[..., :num_colours], axis=2)


@njit(cache=True, nogil=True)
def _undo_filters(rows_Hb: np.ndarray, values_Hb: np.ndarray) -> bool:
    """Undo the filter that each row's first byte names, one byte a pixel (or several pixels); False if unknown.

    Most rows of a mask are all 0 after filtering, and then 0 or equal to the row above (by every filter but the
    average), which is what makes this fast.
    """
    above_b = np.zeros(values_Hb.shape[1], np.uint8)
    for row in range(rows_Hb.shape[0]):
        kind, filtered_b, values_b = rows_Hb[row, 0], rows_Hb[row, 1:], values_Hb[row]
        any_bit = np.uint8(0)
        for x in range(filtered_b.size):
            any_bit |= filtered_b[x]
        if kind == 0 or (kind == SUB and not any_bit):
            for x in range(filtered_b.size):
                values_b[x] = filtered_b[x]
        elif kind in (UP, PAETH) and not any_bit:
            for x in range(above_b.size):
                values_b[x] = above_b[x]
        elif kind == SUB:
            _undo_sub(filtered_b, values_b)
        elif kind == UP:
            for x in range(filtered_b.size):
                values_b[x] = filtered_b[x] + above_b[x]
        elif kind == AVERAGE:
            _undo_average(filtered_b, above_b, values_b)
        elif kind == PAETH:
            _undo_paeth(filtered_b, above_b, values_b)
        else:
            return False
        above_b = values_b
    return True


@njit(cache=True, nogil=True)
def _undo_sub(filtered_b: np.ndarray, values_b: np.ndarray) -> None:
    left = np.uint8(0)
    for x in range(filtered_b.size):
        left += filtered_b[x]
        values_b[x] = left


@njit(cache=True, nogil=True)
def _undo_average(filtered_b: np.ndarray, above_b: np.ndarray, values_b: np.ndarray) -> None:
    left = 0
    for x in range(filtered_b.size):
        left = (filtered_b[x] + (left + above_b[x]) // 2) & 255
        values_b[x] = left


@njit(cache=True, nogil=True)
def _undo_paeth(filtered_b: np.ndarray, above_b: np.ndarray, values_b: np.ndarray) -> None:
    """Predicted from the left, upper or upper left neighbour: whichever is nearest to left + upper - upper left."""
    left, upper_left = 0, 0
    for x in range(filtered_b.size):
        upper = int(above_b[x])
        to_left, to_upper = abs(upper - upper_left), abs(left - upper_left)
        to_upper_left = abs(left + upper - 2 * upper_left)
        if to_left <= to_upper and to_left <= to_upper_left:
            predicted = left
        elif to_upper <= to_upper_left:
            predicted = upper
        else:
            predicted = upper_left
        left = (filtered_b[x] + predicted) & 255
        values_b[x] = left
        upper_left = upper
