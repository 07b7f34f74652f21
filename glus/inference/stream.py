"""Frames read by threads ahead of the model, in the order in which it wants them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from glus.data.frames import VideoSource
from glus.data.transforms import clip_crop

MAX_THREADS = 4
MAX_AHEAD_BYTES = 256 * 2**20
"""Of decoded frames that wait: 10 of 4K, 41 of 1080p."""


@dataclass(frozen=True)
class Frame:
    """A decoded frame."""

    index: int
    pixels_HW3: np.ndarray
    """uint8 RGB."""
    crop_ss3: np.ndarray | None
    """uint8: what CLIP sees; None where its tokens are known already."""


class FrameStream:
    """Reads frames ahead, ``ahead`` of them or ``MAX_AHEAD_BYTES`` at most: memory does not grow with the video.

    Args:
        video: read from several threads if it allows that.
        schedule: (frame, whether CLIP is to see it) in the order of ``take``.
        crop_size: side of CLIP's input in pixels.
        ahead: frames that are read before they are asked for.
    """

    def __init__(self, video: VideoSource, schedule: Iterable[tuple[int, bool]], crop_size: int, ahead: int):
        self._video = video
        self._schedule = iter(schedule)
        self._crop_size = crop_size
        threads = min(MAX_THREADS, os.cpu_count() or 1) if video.reads_in_parallel else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._coming: deque[Future[Frame]] = deque()
        self._ahead = ahead
        self._order_next()  # one, whose size tells how many more

    def take(self, index: int) -> Frame:
        """The next frame of the schedule, which must be ``index``.

        Raises:
            ValueError, FileNotFoundError: it cannot be read; the message names it.
        """
        frame = self._coming.popleft().result()
        room = max(1, MAX_AHEAD_BYTES // frame.pixels_HW3.nbytes)
        while len(self._coming) < min(self._ahead, room) and self._order_next():
            pass
        assert frame.index == index, f"frame {index} was asked for, but frame {frame.index} was scheduled"
        return frame

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _order_next(self) -> bool:
        """Whether there was another frame to order."""
        wanted = next(self._schedule, None)
        if wanted is not None:
            self._coming.append(self._pool.submit(self._read, *wanted))
        return wanted is not None

    def _read(self, index: int, for_clip: bool) -> Frame:
        pixels = self._video.read(index)
        return Frame(index, pixels, clip_crop(pixels, self._crop_size) if for_clip else None)
