"""Which packets become frames, and where decoding may begin: small files as their packets' numbers alone."""

from __future__ import annotations

from fractions import Fraction

import pytest

from glus.data.video_container import FrameIndex, Packet, SeekPoint, count_gaps, lost_packets, order_by_time


def packets(text: str) -> list[Packet]:
    """Of times of showing in the order of the file; ``k`` marks key frames, ``h`` what an edit list hides."""
    told = []
    for number, word in enumerate(text.split()):
        time = None if word.strip("kh") == "-" else int(word.strip("kh"))
        told.append(Packet(time, number, 100 * number, 100, "k" in word, "h" not in word, is_whole=True))
    return told


OPEN = "0k 3 1 2 6k 4 5 9k 7 8"
"""Two frames before each key frame are decoded after it."""
CLOSED = "0k 2 1 3k 5 4"


@pytest.mark.parametrize(
    ("text", "order"),
    [
        (CLOSED, [0, 2, 1, 3, 5, 4]),
        (OPEN, [0, 2, 3, 1, 5, 6, 4, 8, 9, 7]),
        ("0kh 3 1h 2h 6k 4 5", [1, 5, 6, 4]),  # trimmed
        ("0k 0 1 2", None),  # two of one time
        ("0k - 1 2", None),
        ("0 1 2k 3", None),  # begins in the middle of a group
        ("2k 0 1 3", None),  # frames before the first key frame lack what they refer to
        ("", None),
    ],
)
def test_the_order_is_that_of_times_where_they_tell_all(text: str, order: list[int] | None) -> None:
    assert order_by_time(packets(text)) == order


def test_torn_packets_tell_no_order() -> None:
    *others, last = packets(CLOSED)
    assert order_by_time([*others, last._replace(is_whole=False)]) is None


def test_decoding_begins_at_key_frames_or_the_beginning() -> None:
    index = FrameIndex(packets(OPEN), [0, 2, 3, 1, 5, 6, 4, 8, 9, 7])
    beginning = SeekPoint(0, 0)
    assert index.seek_points(0) == [beginning]
    assert index.seek_points(5) == [beginning]  # shown before the key frame that it follows in the file
    assert index.seek_points(6) == [SeekPoint(6, 4), beginning]
    assert index.seek_points(8) == [SeekPoint(6, 4), beginning]
    assert index.seek_points(9) == [SeekPoint(9, 7), SeekPoint(6, 4), beginning]
    assert not index.is_closed
    assert FrameIndex(packets(CLOSED), [0, 2, 1, 3, 5, 4]).is_closed


def test_hidden_key_frames_are_no_beginning() -> None:
    index = FrameIndex(packets("0kh 3 1h 2h 6k 4 5"), [1, 5, 6, 4])
    assert index.seek_points(1) == [SeekPoint(0, 0)]
    assert index.seek_points(3) == [SeekPoint(3, 4), SeekPoint(0, 0)]
    assert not index.is_closed


def test_a_key_frame_after_which_earlier_packets_come_is_no_beginning() -> None:
    index = FrameIndex(packets("0k 4 1k 2 3"), [0, 2, 3, 4, 1])
    assert index.seek_points(4) == [SeekPoint(0, 0)]


def test_the_rate_is_of_what_is_shown() -> None:
    base = Fraction(1, 10)
    assert FrameIndex(packets(CLOSED), [0, 2, 1, 3, 5, 4]).frames_per_second(base) == pytest.approx(10)
    assert FrameIndex(packets("0k 2 4 8"), range(4)).frames_per_second(base) == pytest.approx(3 / 0.8)
    assert FrameIndex(packets("0k - 1 2"), range(4)).frames_per_second(base) == pytest.approx(10)  # by decoding times
    assert FrameIndex(packets("0k"), [0]).frames_per_second(base) is None


def test_packets_without_a_frame_are_lost_unless_they_precede_the_first() -> None:
    assert lost_packets(packets("3k 1 2 6 5 7h"), [0, 4]) == [3]
    assert lost_packets(packets("-k - -"), [0]) == []


@pytest.mark.parametrize(
    ("times", "num_gaps"),
    [
        (range(30), 0),
        ([*range(15), *range(17, 30)], 1),
        ([*range(10), *range(20, 30), *range(31, 40)], 2),
        ([0, 33, 67, 100, 133, 167, 200], 0),  # whole milliseconds
        ([0, 1, 3, 4, 8, 9, 15], 0),  # variable rate
        ([0], 0),
    ],
)
def test_gaps_are_counted_where_the_rate_is_constant(times: range | list[int], num_gaps: int) -> None:
    assert count_gaps(packets(" ".join(map(str, times)))) == num_gaps
