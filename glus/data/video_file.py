"""Video files as sources of frames: which decoder reads a file, and the frames that are kept."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

KEPT_BYTES = 64 * 2**20
"""Decoded frames of a video file that are kept: 24 at 720p."""
MIN_KEPT = 8
"""Frames that are kept however large they are."""


class FileVideo:
    """A video file; frames are called 00000, 00001, ...

    Frames are those that a player shows, in its order, whatever time lies between them, and stand upright. PyAV lists
    them, and decodes them, too, unless the list is so plain that decord finds the same: decord reads such a file, and
    where it fails, PyAV takes over, or says why. Several threads may read at once; about ``KEPT_BYTES`` of decoded
    frames are kept, so that reading a few frames out of order or backwards does not make the decoder start anew from an
    earlier key frame each time.

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
        self._plain = _open_plain(self.path, len(self._decoder)) if self._decoder.is_plain else None
        self._lock = threading.Lock()
        self._kept: dict[int, np.ndarray] = {}
        self._next = 0  # the frame that the decoder gives without seeking
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
                    self._keep(number, self._decode(number))
            return self._kept[index]

    def _first_to_decode(self, index: int) -> int:
        """Where to start so that the frames next to ``index``, which are likely to be asked for, are kept too."""
        room = self._room()
        if self._next <= index < self._next + room:
            return self._next
        return max(0, index - room + 1) if index < self._next else index

    def _room(self) -> int:
        """Number of frames that are kept."""
        if not self._kept:
            return MIN_KEPT
        return max(MIN_KEPT, KEPT_BYTES // next(iter(self._kept.values())).nbytes)

    def _keep(self, index: int, frame: np.ndarray) -> None:
        self._kept[index] = frame
        while len(self._kept) > self._room():
            del self._kept[next(iter(self._kept))]  # the one decoded longest ago

    def _decode(self, index: int) -> np.ndarray:
        frame = self._decode_plain(index)
        if frame is None:
            frame = self._decoder.read(index)
        self._next = index + 1
        return frame

    def _decode_plain(self, index: int) -> np.ndarray | None:
        """By decord; None where it does not read the file, or fails: then, and from then on, PyAV does."""
        if self._plain is None:
            return None
        import decord

        try:
            frame = self._plain[index].asnumpy()
        except (decord.DECORDError, RuntimeError):
            self._plain = None
            return None
        height, width = frame.shape[:2]
        # decord 0.6 takes the padding of narrow frames (48 pixels: 192 bytes a row) for a fourth channel.
        return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _open_plain(path: Path, num_frames: int) -> Any | None:
    """decord's reader; None where decord is not installed (it has no wheels for ARM) or finds other frames."""
    try:
        import decord
    except ImportError:
        return None
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
    except (decord.DECORDError, RuntimeError, UnicodeEncodeError):  # the last of a name that is no UTF-8
        return None
    return reader if len(reader) == num_frames else None
