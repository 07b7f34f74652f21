"""Frames as RGB pixels: of a benchmark by video and name, of anybody's folder or video file by index; read ahead."""

from __future__ import annotations

import logging
import mmap
import os
import re
import struct
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from glus.config import DatasetConfig
from glus.data.benchmarks.index import LAYOUTS, image_folder
from glus.types import Role

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
"""Of pictures, those of the benchmarks first."""
UPSIDE_DOWN_MIRRORED = 4
"""Of EXIF's orientations 1 to 8, the last one that keeps width and height."""
_LISTED = 5
"""Files that a message lists."""
KEPT_BYTES = 64 * 2**20
"""Decoded frames of a video file that are kept: 24 at 720p."""
MIN_KEPT = 8
"""Frames that are kept however large they are."""
MAX_THREADS = 4
MAX_AHEAD_BYTES = 256 * 2**20
"""Of decoded frames that wait: 10 of 4K, 41 of 1080p."""
MATRIX_AT, MATRIX_SIZE = {b"\0": 40, b"\1": 52}, 36
"""Where the contents of a "tkhd" box of each version have the matrix (version 1 has 64-bit times), and its bytes."""


@contextmanager
def open_image(path: Path, name: str) -> Iterator[Image.Image]:
    """A picture file, opened, whose defects are errors that name it; also those met inside the block.

    Args:
        path: of the file.
        name: how the error message calls it, e.g. ``mevis/0a1b2c/00012``.

    Raises:
        FileNotFoundError: no such file, or a link to none.
        ValueError: it does not decode (cut short, corrupt, not a picture), or has more pixels than a picture has.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        link = f", a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else " is missing"
        raise FileNotFoundError(f"frame {name}: {path}{link}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"frame {name} is too large: {path}: {error}; expected a frame of a video") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"frame {name} does not decode: {path}: {error}") from error


def read_image(path: Path, name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright as the file's EXIF orientation says; 16-bit grey is scaled, not cut off.

    Args:
        path: a picture file.
        name: see ``open_image``.

    Raises:
        FileNotFoundError, ValueError: see ``open_image``; also for grey of more than 16 bits.
    """
    with open_image(path, name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "I" and image.mode != "F" and not image.mode.startswith("I;"):
            return np.array(image.convert("RGB"))
        grey_HW = np.asarray(image)
        if image.mode == "F" or grey_HW.min() < 0 or grey_HW.max() >= 2**16:
            raise ValueError("grey values of more than 16 bits; expected 8 or 16")
        return np.repeat((grey_HW // 257).astype(np.uint8)[..., None], 3, axis=2)


class FrameStore:
    """The frames of one split: ``<images>/<video>/<frame>.jpg`` (or another of ``SUFFIXES``, in any case).

    A picture of RefCOCO or ReasonSeg is a video of one frame, which lies in ``<images>`` itself.
    """

    def __init__(self, dataset: DatasetConfig):
        self.name = dataset.name
        self.folder = image_folder(dataset)
        self._is_flat = LAYOUTS[dataset.layout].is_flat

    def path(self, video: str, frame: str) -> Path:
        """The file of a frame.

        Raises:
            FileNotFoundError: there is none with a known suffix.
        """
        folder = self.folder if self._is_flat else self.folder / video
        for suffix in SUFFIXES[:3]:  # those of the benchmarks; asking for a file is faster than listing the folder
            path = folder / f"{frame}{suffix}"
            if path.is_file():
                return path
        found = self._as_written(folder, frame)
        if found is None:
            raise FileNotFoundError(
                f"frame {self.name}/{video}/{frame} is missing; expected {folder / frame}.jpg "
                f"(or {', '.join(SUFFIXES[1:])})"
            )
        return found

    def _as_written(self, folder: Path, frame: str) -> Path | None:
        """The file whose suffix is in capitals, rare, or whose name or folder's name has its accents composed otherwise
        (as files have that were packed on a Mac)."""
        if not folder.is_dir() and self.folder.is_dir():
            alike = (f for f in self.folder.iterdir() if _composed(f.name) == _composed(folder.name))
            folder = next(alike, folder)
        files = folder.iterdir() if folder.is_dir() else ()
        wanted = (f for f in files if f.suffix.lower() in SUFFIXES and _composed(f.stem) == _composed(frame))
        return min(wanted, default=None)

    def read(self, video: str, frame: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file does not decode.
        """
        return read_image(self.path(video, frame), f"{self.name}/{video}/{frame}")

    def size(self, video: str, frame: str) -> tuple[int, int]:
        """(H, W) of the upright picture, from the file's header where it has no orientation."""
        with open_image(self.path(video, frame), f"{self.name}/{video}/{frame}") as image:
            turned = _orientation(image) > UPSIDE_DOWN_MIRRORED
            return (image.width, image.height) if turned else (image.height, image.width)

    def is_turned(self, video: str, frame: str) -> bool:
        """Whether an EXIF orientation turns or mirrors the stored picture; no frame of a benchmark has one."""
        with Image.open(self.path(video, frame)) as image:
            return _orientation(image) != 1


def _orientation(image: Image.Image) -> int:
    """1: stored upright; up to ``UPSIDE_DOWN_MIRRORED``: turned by 180 degrees or mirrored; then: by 90 degrees too."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class VideoSource(Protocol):
    """A video that is read frame by frame."""

    @property
    def names(self) -> Sequence[str]:
        """What the frames are called, in temporal order."""

    @property
    def reads_in_parallel(self) -> bool:
        """Whether several threads gain by reading frames at the same time."""

    def __len__(self) -> int:
        """Number of frames."""

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of a frame."""


class DatasetVideo:
    """One video of a benchmark as a ``VideoSource``."""

    reads_in_parallel = True

    def __init__(self, store: FrameStore, video: str, names: Sequence[str]):
        self._store, self._video = store, video
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of frame ``index``."""
        return self._store.read(self._video, self.names[index])


class FolderVideo:
    """The pictures of a folder, whatever their names, in natural order (``img2`` before ``img10``).

    What lies there beside them is left out, which the log says with the names.

    Raises:
        FileNotFoundError: the folder does not exist, holds no picture, or a link to one that does not exist.
        ValueError: two pictures differ in their suffix alone, so that their masks would get one name.
    """

    reads_in_parallel = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no folder of frames at {self.path}")
        entries = sorted(self.path.iterdir(), key=lambda entry: (_natural(entry.stem), entry.name))
        # Names that begin with a dot are notes of the system, such as the ._00004.jpg of a Mac.
        self._files = [e for e in entries if e.suffix.lower() in SUFFIXES and e.name[0] != "." and not e.is_dir()]
        if not self._files:
            raise FileNotFoundError(
                f"folder {self.path} holds no frames; expected files ending in {', '.join(SUFFIXES)}"
            )
        lost = [file for file in self._files if not file.exists()]
        if lost:
            raise FileNotFoundError(f"{lost[0]} is a link to {os.readlink(lost[0])}, which does not exist")
        self.names = tuple(file.stem for file in self._files)
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(f"folder {self.path} holds several pictures called {twice[0]!r}; expected one per name")
        others = [entry.name for entry in entries if entry not in set(self._files)]
        if others:
            named = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
            log.warning(
                "%s: %d pictures are read; %d other entries are left out: %s",
                self.path,
                len(self._files),
                len(others),
                named,
            )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of frame ``index``."""
        return read_image(self._files[index], f"{self.path.name}/{self.names[index]}")


class FileVideo:
    """A video file, decoded by decord; frames are called 00000, 00001, ...

    Frames are addressed by index, whatever time lies between them (variable rates), and stand as a player shows them:
    decord rotates them by the file's display matrix, and what that mirrors is mirrored here. Several threads may read
    at once; about ``KEPT_BYTES`` of decoded frames are kept, so that reading a few frames out of order or backwards
    does not make the decoder start anew from an earlier key frame each time.

    Raises:
        FileNotFoundError: no such file.
        ImportError: decord is not installed.
        ValueError: the file does not decode, holds no video stream, or a stream without frames, or is to be shown
            aslant and mirrored.
    """

    reads_in_parallel = False  # the decoder goes from frame to frame

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no video file at {self.path}")
        self._reader = _open_reader(self.path)
        self._flipped_axis = flipped_axis(self.path)
        self._lock = threading.Lock()
        self._kept: dict[int, np.ndarray] = {}
        self._next = 0  # the frame that the decoder gives without seeking
        if len(self._reader) == 0:
            raise ValueError(f"video {self.path} holds no frames")
        self.names = tuple(f"{index:05d}" for index in range(len(self._reader)))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def frames_per_second(self) -> float:
        """Average over the video."""
        return float(self._reader.get_avg_fps())

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of frame ``index``; not to be written to.

        Raises:
            ValueError: the frame does not decode; decoding runs a little ahead, so the damage may lie just behind it.
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
        import decord

        try:
            frame = self._reader[index].asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise ValueError(f"frame {index} of video {self.path} does not decode: {_first_line(error)}") from error
        self._next = index + 1
        height, width = frame.shape[:2]
        # decord 0.6 takes the padding of narrow frames (48 pixels: 192 bytes a row) for a fourth channel.
        frame = frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        return frame if self._flipped_axis is None else np.flip(frame, self._flipped_axis).copy()  # torch needs a copy


def open_video(path: str | Path) -> VideoSource:
    """A folder of pictures or a video file.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or an empty folder.
        ValueError: it does not decode.
    """
    if not str(path):
        raise FileNotFoundError("no video: its name is empty; expected a folder of frames or a video file")
    if Path(path).is_dir():
        return FolderVideo(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"no video at {path}; expected a folder of frames or a video file")
    return FileVideo(path)


def _open_reader(path: Path) -> Any:
    try:
        import decord
    except ImportError as error:
        raise ImportError(f"{path} is a video file; install decord to read it, or give a folder of frames") from error
    try:
        return decord.VideoReader(str(path), num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:
        if "cannot find video stream" in str(error):
            raise ValueError(f"{path} holds no video stream, or one without frames; expected a video file") from error
        raise ValueError(f"video {path} does not decode: {_first_line(error)}") from error


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


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


@dataclass(frozen=True)
class Frame:
    """A decoded frame."""

    index: int
    pixels_HW3: np.ndarray
    """uint8 RGB."""
    prepared: Mapping[Role, np.ndarray]
    """uint8: what the MLLM sees, as what the frame is shown; nothing where its visual tokens are known already."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.pixels_HW3.shape[:2]
        return height, width


class FrameStream:
    """Reads frames ahead, ``ahead`` of them or ``MAX_AHEAD_BYTES`` at most: memory does not grow with the video.

    Args:
        video: read from several threads if it allows that.
        schedule: (frame, the roles in which the MLLM is to see it) in the order of ``take``.
        prepare: ``Mllm.prepare``.
        ahead: frames that are read before they are asked for.
    """

    def __init__(
        self,
        video: VideoSource,
        schedule: Iterable[tuple[int, Sequence[Role]]],
        prepare: Callable[[np.ndarray, Role], np.ndarray],
        ahead: int,
    ):
        self._video = video
        self._schedule = iter(schedule)
        self._prepare = prepare
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

    def _read(self, index: int, roles: Sequence[Role]) -> Frame:
        pixels = self._video.read(index)
        return Frame(index, pixels, {role: self._prepare(pixels, role) for role in roles})
