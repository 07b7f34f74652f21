"""What a container cuts off the frames of a track: players obey it, and PyAV does not tell."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

_Element = tuple[bytes, int, int]
"""Of a file: its kind, where its content begins and ends."""
_Reader = Callable[[BinaryIO, int, int], Iterator[_Element]]
_ENTRY_BYTES = 78
"""Of an MP4 sample entry of video, before the boxes in it."""
_SEGMENT, _TRACKS, _TRACK, _VIDEO = (bytes.fromhex(code) for code in ("18538067", "1654ae6b", "ae", "e0"))
_PIXEL_CROPS = {bytes.fromhex(code): side for code, side in (("54cc", 0), ("54dd", 1), ("54bb", 2), ("54aa", 3))}


class Crop(NamedTuple):
    """Pixels cut off at each side."""

    left: int
    right: int
    top: int
    bottom: int


def read_crop(path: Path, is_mp4: bool, track: int, size: tuple[int, int]) -> Crop | None:
    """What is cut off, or None where that is nothing, or as much as there is.

    Args:
        path: an MP4, or else a Matroska file that FFmpeg has opened.
        is_mp4: which of the two; MOV is the first.
        track: number of the track among all.
        size: width and height of its frames.
    """
    with path.open("rb") as file:
        crop = _of_mp4(file, track, size) if is_mp4 else _of_matroska(file, track)
    width, height = size
    fits = min(crop) >= 0 and crop.left + crop.right < width and crop.top + crop.bottom < height
    return crop if any(crop) and fits else None


def _of_mp4(file: BinaryIO, track: int, size: tuple[int, int]) -> Crop:
    """By the clean aperture: how wide and high, how far its middle is from that of the frame.

    Source: ISO/IEC 14496-12, 12.1.4 (CleanApertureBox).
    """
    whole = [(b"", 0, file.seek(0, 2))]
    traks = list(_inside(file, _boxes, whole, b"moov", b"trak"))
    descriptions = _inside(file, _boxes, traks[track : track + 1], b"mdia", b"minf", b"stbl", b"stsd")
    entries = [entry for _, begin, end in descriptions for entry in _boxes(file, begin + 8, end)]
    boxes = [box for _, begin, end in entries for box in _boxes(file, begin + _ENTRY_BYTES, end)]
    for kind, begin, end in boxes:
        if kind == b"clap" and end - begin >= 32:
            file.seek(begin)
            numbers = struct.unpack(">8i", file.read(32))
            if all(numbers[1::2]):
                across, down, right, below = (Fraction(*numbers[at : at + 2]) for at in (0, 2, 4, 6))
                free = (size[0] - across) / 2, (size[1] - down) / 2
                return Crop(int(free[0] + right), int(free[0] - right), int(free[1] + below), int(free[1] - below))
    return Crop(0, 0, 0, 0)


def _of_matroska(file: BinaryIO, track: int) -> Crop:
    """By PixelCropLeft and so on.

    Source: RFC 9559, 5.1.4.1.28 (Video).
    """
    whole = [(b"", 0, file.seek(0, 2))]
    tracks = list(islice(_inside(file, _elements, whole, _SEGMENT, _TRACKS, _TRACK), track + 1))
    sides = [0, 0, 0, 0]
    videos = _inside(file, _elements, tracks[track:], _VIDEO)
    settings = [setting for _, begin, end in videos for setting in _elements(file, begin, end)]
    for kind, begin, end in settings:
        if kind in _PIXEL_CROPS:
            file.seek(begin)
            sides[_PIXEL_CROPS[kind]] = int.from_bytes(file.read(min(end - begin, 8)), "big")
    return Crop(*sides)


def _inside(file: BinaryIO, read: _Reader, among: Iterable[_Element], *kinds: bytes) -> Iterator[_Element]:
    """Elements of the last kind in those of the kind before it, and so on, in those that are given."""
    for _, at, end in among:
        for one in read(file, at, end):
            if one[0] == kinds[0]:
                yield from _inside(file, read, [one], *kinds[1:]) if kinds[1:] else [one]


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[_Element]:
    """Of MP4, those between two places."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind, begin = int.from_bytes(head[:4], "big"), head[4:8], at + 8
        if size == 1:  # it follows, in 64 bits
            size, begin = int.from_bytes(head[8:], "big"), at + 16
        stop = at + size if size else end  # 0: to the end
        if not begin <= stop <= end:
            return
        yield kind, begin, stop
        at = stop


def _elements(file: BinaryIO, at: int, end: int) -> Iterator[_Element]:
    """Of Matroska, those between two places; one of unknown size ends with what it is in."""
    while at + 2 <= end:
        file.seek(at)
        head = file.read(12)
        code = 9 - head[0].bit_length()  # bytes of the kind, as leading zero bits tell
        width = 9 - head[code].bit_length() if code <= 4 and head[code:] else 9
        if width > 8:
            return
        size = int.from_bytes(head[code : code + width], "big") & ((1 << 7 * width) - 1)
        begin = at + code + width
        stop = end if size == (1 << 7 * width) - 1 else min(begin + size, end)
        yield head[:code], begin, stop
        at = stop
