"""Video files as sources of frames, some of which are kept."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

KEPT_BYTES = 64 * 2**20
"""Decoded frames of a video file that are kept: 24 at 720p."""
MIN_KEPT = 8
"""Frames that are kept however large they are."""


class FileVideo:
    """A video file; frames are called 00000, 00001, ...

    Frames are those that a player shows, in its order, whatever time lies between them, and stand upright. Several
    threads may read at once; about ``KEPT_BYTES`` of decoded frames are kept, so that reading a few frames out of order
    or backwards does not make the decoder start anew from an earlier key frame each time.

    Raises:
        FileNotFoundError: no such file.
        ImportError: PyAV is not installed.
        ValueError: the file does not decode, holds no video stream, or a stream without frames, is cut short, or is to
            be shown aslant.
    """

    reads_in_parallel = False  # the decoder goes from frame to frame

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no video file at {path}")
        try:
            from glus.data.video_decoder import VideoDecoder
        except ImportError as error:
            raise ImportError(f"{path} is a video file; install av to read it, or give a folder of frames") from error
        self._decoder = VideoDecoder(self.path)
        self._lock = threading.Lock()
        self._kept: dict[int, np.ndarray] = {}
        self.names = tuple(f"{index:05d}" for index in range(len(self._decoder)))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def frames_per_second(self) -> float:
        """Average over the video."""
        return self._decoder.frames_per_second

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of frame ``index``; not to be written to.

        Raises:
            ValueError: the frame does not decode, or one that it depends on.
        """
        with self._lock:
            if index not in self._kept:
                for number in range(self._first_to_decode(index), index + 1):
                    self._keep(number, self._decoder.read(number))
            return self._kept[index]

    def _first_to_decode(self, index: int) -> int:
        """Where to start so that the frames next to ``index``, which are likely to be asked for, are kept too."""
        room, following = self._room(), self._decoder.following
        if following <= index < following + room:
            return following
        return max(0, index - room + 1) if index < following else index

    def _room(self) -> int:
        """Number of frames that are kept."""
        if not self._kept:
            return MIN_KEPT
        return max(MIN_KEPT, KEPT_BYTES // next(iter(self._kept.values())).nbytes)

    def _keep(self, index: int, frame: np.ndarray) -> None:
        self._kept[index] = frame
        while len(self._kept) > self._room():
            del self._kept[next(iter(self._kept))]  # the one decoded longest ago
