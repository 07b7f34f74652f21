"""Which packets of a video file become frames, in which order, and where decoding may begin: numbers alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple

LONG_STEP, EVEN_STEP = 1.6, 1.2
"""Times the usual step from frame to frame: a longer one is a gap; others are even, though times may be rounded."""
MAX_GAPS = 0.1
"""Share of the steps: where more are gaps or uneven, the rate is taken to be variable."""


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
