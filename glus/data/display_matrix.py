"""How a player shows a video file: the display matrix of MP4 and MOV, of which decord obeys the rotation alone."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

MATRIX_AT, MATRIX_SIZE = {b"\0": 40, b"\1": 52}, 36
"""Where the contents of a "tkhd" box of each version have the matrix (version 1 has 64-bit times), and its bytes."""


def flipped_axis(path: Path) -> int | None:
    """Which axis of a frame (0: rows, 1: columns) is still to be reversed after decord's rotation; None: neither.

    Of the eight ways to lay a picture on a screen, decord tells apart the four rotations. A mirrored picture is one
    that is turned upside down and then rotated; a quarter turn later, upside down means left to right.

    Source: ISO/IEC 14496-12, 8.3.2 (Track Header Box); checked against ffmpeg, which obeys all eight.

    Args:
        path: of a video file; other containers than MP4 and MOV have no such matrix.

    Raises:
        ValueError: the picture is mirrored, and turned by something else than quarters.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for track in _boxes(data, (0, len(data)), b"moov", b"trak"):
            handlers = [data[start + 8 : start + 12] for start, _ in _boxes(data, track, b"mdia", b"hdlr")]
            headers = list(_boxes(data, track, b"tkhd"))
            if handlers == [b"vide"] and headers:
                start, stop = headers[0]
                at = MATRIX_AT.get(data[start : start + 1])
                if at is not None and start + at + MATRIX_SIZE <= stop:
                    a, b, _, c, d = struct.unpack_from(">5i", data, start + at)
                    return _axis(a, b, c, d, path)
    return None


def _axis(a: int, b: int, c: int, d: int, path: Path) -> int | None:
    """A pixel (x, y) is shown at (a x + c y, b x + d y)."""
    if a * d - b * c >= 0:
        return None
    if (a, d) != (0, 0) and (b, c) != (0, 0):
        raise ValueError(f"video {path} is mirrored and turned by no quarter turn; store its frames upright")
    return 1 if (a, d) == (0, 0) else 0


def _boxes(data: mmap.mmap, inside: tuple[int, int], *path: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of the contents of every box at a path of box types."""
    at, end = inside
    while at + 16 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1:
            size, start = struct.unpack_from(">Q", data, start)[0], at + 16
        stop = min(at + size, end) if size else end
        if stop < start:
            return  # not made of boxes
        if kind == path[0]:
            yield from _boxes(data, (start, stop), *path[1:]) if path[1:] else [(start, stop)]
        at = stop
