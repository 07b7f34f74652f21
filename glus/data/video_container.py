"""What a video file says of itself, read without a decoder: which packets become frames, and what its bytes tell.

- Packets as numbers alone: which become frames, in which order, and where decoding may begin;
- what a container cuts off the frames of a track: players obey it, and PyAV does not tell;
- how long a whole file would be, and whether it is of the MP4 family.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, islice, pairwise
from pathlib import Path
from statistics import median
from typing import BinaryIO, NamedTuple

LONG_STEP, EVEN_STEP = 1.6, 1.2
"""Times the usual step from frame to frame: a longer one is a gap; others are even, though times may be rounded."""
MAX_GAPS = 0.1
"""Share of the steps: where more are gaps or uneven, the rate is taken to be variable."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
_Element = tuple[bytes, int, int]
"""Of a file: its kind, where its content begins and ends."""
_Reader = Callable[[BinaryIO, int, int], Iterator[_Element]]
_ENTRY_BYTES = 78
"""Of an MP4 sample entry of video, before the boxes in it."""
_EBML, _SEGMENT, _TRACKS = (bytes.fromhex(code) for code in ("1a45dfa3", "18538067", "1654ae6b"))
_TRACK, _VIDEO = bytes.fromhex("ae"), bytes.fromhex("e0")
"""Matroska: what a file begins with, the element that holds all else, and some in it."""
_PIXEL_CROPS = {bytes.fromhex(code): side for code, side in (("54cc", 0), ("54dd", 1), ("54bb", 2), ("54aa", 3))}


class Packet(NamedTuple):
    """What a container says of a packet; times are in units of the stream."""

    pts: int | None
    dts: int | None
    position: int | None
    """Of its first byte in the file."""
    size: int
    is_key: bool
    is_shown: bool
    """Neither before the beginning nor after the end that an edit list sets."""
    is_whole: bool
    """Not cut off by the end of the file."""


class SeekPoint(NamedTuple):
    """Decoding from ``packet`` on gives ``frame`` and all that follow it."""

    frame: int
    packet: int


class FrameIndex:
    """The frames of a file.

    Args:
        packets: all of the stream, in the order of the file.
        shown: number of the packet of each frame, in the order in which frames are shown; at least one.
    """

    def __init__(self, packets: Sequence[Packet], shown: Sequence[int]):
        self.shown = shown
        self.places = {number: place for place, number in reversed(list(enumerate(shown)))}
        """Packet -> the frame that comes of it."""
        earliest = list(accumulate(reversed(shown), min))[::-1]  # packet of this frame and of all after it
        latest = list(accumulate(shown, max))  # packet of this frame and of all before it
        keys = [number for number, packet in enumerate(packets) if packet.is_key and number in self.places]
        self._points = [SeekPoint(0, 0)]
        self._points += [SeekPoint(self.places[key], key) for key in keys if key and earliest[self.places[key]] == key]
        self.is_closed = len(self.places) == len(shown) == len(packets) and all(
            earliest[self.places[key]] == latest[self.places[key]] == key for key in keys
        )
        """Every packet is a frame, and none that follows a key frame in the file is shown before it."""
        self._clocks = [packets[number].pts for number in shown], [packet.dts for packet in packets]

    def seek_points(self, frame: int) -> list[SeekPoint]:
        """Where to begin for a frame: the nearest place, the one before it, the beginning of the file."""
        nearest = bisect_right(self._points, frame, key=lambda point: point.frame)
        return [*reversed(self._points[max(nearest - 2, 1) : nearest]), self._points[0]]

    def frames_per_second(self, time_base: Fraction) -> float | None:
        """Average over the video; None for one frame, or without times that ascend."""
        for clock in self._clocks:
            times = [time for time in clock if time is not None]
            if 1 < len(times) == len(clock) and all(time < later for time, later in pairwise(times)):
                return (len(self.shown) - 1) / float((times[-1] - times[0]) * time_base) or None
        return None


def order_by_time(packets: Sequence[Packet]) -> list[int] | None:
    """Numbers of the packets to show, by their times; None unless every packet is whole and has a time of its own.

    None, too, where something is shown before the first key frame: decoders differ in what they make of it.
    """
    times = [packet.pts for packet in packets if packet.pts is not None and packet.is_whole]
    if not packets or len(set(times)) < len(packets) or not packets[0].is_key or min(times) != packets[0].pts:
        return None
    shown = [number for number, packet in enumerate(packets) if packet.is_shown]
    return sorted(shown, key=lambda number: packets[number].pts or 0)


def lost_packets(packets: Sequence[Packet], shown: Sequence[int]) -> list[int]:
    """Numbers of the packets to show that gave no frame, although their times lie behind that of the first frame."""
    given, first = set(shown), packets[shown[0]].pts
    times = [packet.pts if packet.is_shown and number not in given else None for number, packet in enumerate(packets)]
    return [number for number, time in enumerate(times) if time is not None and first is not None and time > first]


def count_gaps(packets: Sequence[Packet]) -> int:
    """How often a packet seems to be missing between two others, by their times; 0 where the rate is variable."""
    times = sorted({packet.pts for packet in packets if packet.pts is not None})
    steps = [later - time for time, later in pairwise(times)]
    usual = median(steps) if steps else 0
    gaps = sum(step > LONG_STEP * usual for step in steps)
    even = sum(usual / EVEN_STEP <= step <= usual * EVEN_STEP for step in steps)
    return gaps if len(steps) - even <= MAX_GAPS * len(steps) else 0


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
    """Of Matroska, those that begin between two places; one of unknown size (all ones, as in a live recording) ends
    with what it is in.

    Source: RFC 8794, 4 to 6.
    """
    while at + 2 <= end:
        file.seek(at)
        head = file.read(12)
        code = 9 - head[0].bit_length() if head else 9  # bytes of the kind, as leading zero bits tell
        width = 9 - head[code].bit_length() if code <= 4 and head[code:] else 9
        if width > 8:
            return
        size = int.from_bytes(head[code : code + width], "big") & ((1 << 7 * width) - 1)
        begin = at + code + width
        stop = end if size == (1 << 7 * width) - 1 else begin + size
        yield head[:code], begin, stop
        at = stop


def told_size(path: Path) -> int:
    """Bytes of a file as AVI and Matroska begin with them; 0 where they do not know.

    Source: RIFF; RFC 9559, 5.1 (Segment).
    """
    with path.open("rb") as file:
        beginning = file.read(8)
        if beginning[:4] == b"RIFF":
            return int.from_bytes(beginning[4:], "little") + 8
        elements = _elements(file, 0, path.stat().st_size) if beginning[:4] == _EBML else ()
        return next((stop for kind, _, stop in elements if kind == _SEGMENT), 0)


def iso_brand(path: Path) -> bytes:
    """What a file of the MP4 family says that it is, among them pictures (``HEIF_BRANDS``); empty for any other file.

    Source: ISO/IEC 14496-12, 4.3 (FileTypeBox).
    """
    with path.open("rb") as file:
        beginning = file.read(12)
    return beginning[8:] if beginning[4:8] == b"ftyp" else b""
