"""Frames that wait are bounded in bytes, whatever their size."""

from __future__ import annotations

import threading
from contextlib import closing

import numpy as np
import pytest

from glus.data import frames as reading
from glus.data.frames import FrameStream
from glus.types import Role


class Frames:
    """Of any size; remembers which have been asked for."""

    reads_in_parallel = False

    def __init__(self, height: int, width: int):
        self.asked: list[int] = []
        self._pixels = np.zeros((height, width, 3), np.uint8)
        self.names = [str(number) for number in range(40)]

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> np.ndarray:
        """The same pixels for every frame."""
        self.asked.append(index)
        return self._pixels


@pytest.mark.parametrize(("height", "ahead"), [(10, 8), (100, 5), (1000, 1)])
def test_large_frames_are_read_less_far_ahead(monkeypatch: pytest.MonkeyPatch, height: int, ahead: int) -> None:
    monkeypatch.setattr(reading, "MAX_AHEAD_BYTES", 5 * 100 * 20 * 3)
    video, schedule = Frames(height, 20), ((number, (Role.query,)) for number in range(40))
    with closing(FrameStream(video, schedule, lambda pixels, role: pixels[:8, :8], ahead=8)) as frames:
        for number in range(20):
            assert frames.take(number).index == number
            assert len(frames._coming) == ahead
            for coming in frames._coming:
                coming.result()
            assert video.asked == list(range(number + 1 + ahead))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frames")]
