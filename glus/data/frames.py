"""Frames as RGB pixels: of a benchmark by video and name, of anybody's folder or video file by index; read ahead."""

from __future__ import annotations

import logging
import os
import re
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps

from glus.config import DatasetConfig
from glus.data.benchmarks.index import LAYOUTS, image_folder
from glus.data.video_file import FileVideo
from glus.files import expanded
from glus.types import PrepareFrame, Role

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
"""Of pictures, those of the benchmarks first."""
UPSIDE_DOWN_MIRRORED = 4
"""Of EXIF's orientations 1 to 8, the last one that keeps width and height."""
_LISTED = 5
"""Files that a message lists."""
MAX_THREADS = 4
MAX_AHEAD_BYTES = 256 * 2**20
"""Of decoded frames that wait: 10 of 4K, 43 of 1080p."""


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
        FileNotFoundError, ValueError: see ``open_image``; also for grey of more than 16 bits, and several pictures.
    """
    with open_image(path, name) as image:
        if (count := num_pictures(image)) > 1:
            raise ValueError(f"it holds {count} pictures, expected one; given by itself, such a file is a video")
        return _upright_rgb(image)


def num_pictures(image: Image.Image) -> int:
    """Pages of a TIFF, frames of an animation; a photo's previews (MPO) do not count."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _upright_rgb(image: Image.Image) -> np.ndarray:
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
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
        self._layout = LAYOUTS[dataset.layout]

    def path(self, video: str, frame: str) -> Path:
        """The file of a frame.

        Raises:
            FileNotFoundError: there is none with a known suffix.
        """
        folder = self.folder / self._layout.frame_folder.replace("{video}", video)
        for suffix in SUFFIXES[:3]:  # those of the benchmarks; asking for a file is faster than listing the folder
            path = folder / f"{frame}{suffix}"
            if path.is_file():
                return path
        found = self._as_written(folder, frame)
        if found is None:
            packed = self.folder.with_suffix(".tar")  # MeViS 2 on its hub
            hint = f": unpack {packed} first" if packed.is_file() and not self.folder.is_dir() else ""
            raise FileNotFoundError(
                f"frame {self.name}/{video}/{frame} is missing; expected {folder / frame}.jpg "
                f"(or {', '.join(SUFFIXES[1:])}){hint}"
            )
        return found

    def _as_written(self, folder: Path, frame: str) -> Path | None:
        """The file whose suffix is in capitals, rare, or whose name or folder's name has its accents composed otherwise
        (as files have that were packed on a Mac)."""
        if not folder.is_dir() and folder.parent.is_dir():
            alike = (f for f in folder.parent.iterdir() if _composed(f.name) == _composed(folder.name))
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
            # Of a TIFF, Pillow turns the size itself.
            turned = orientation(image) > UPSIDE_DOWN_MIRRORED and image.format != "TIFF"
            return (image.width, image.height) if turned else (image.height, image.width)

    def is_turned(self, video: str, frame: str) -> bool:
        """Whether an EXIF orientation turns or mirrors the stored picture; no frame of a benchmark has one."""
        with Image.open(self.path(video, frame)) as image:
            return orientation(image) != 1


def orientation(image: Image.Image) -> int:
    """By EXIF. 1: stored upright; up to ``UPSIDE_DOWN_MIRRORED``: turned by 180 degrees or mirrored; then: by 90."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def are_ascending(names: Sequence[str]) -> bool:
    """Whether numbered names ascend; so do names that are not one text with other numbers in it.

    >>> are_ascending(["2", "10"]), are_ascending(["img10", "img2"]), are_ascending(["cat", "ant"])
    (True, False, True)
    """
    is_numbered = len({re.sub(r"[0-9]+", "0", name) for name in names}) == 1
    return not is_numbered or all(_natural(one) <= _natural(next_) for one, next_ in pairwise(names))


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

    def read(self, index: int, /) -> np.ndarray:
        """(H, W, 3) uint8 RGB of a frame."""


class FrameList:
    """A ``VideoSource`` of named frames that a function reads by their index."""

    def __init__(self, names: Sequence[str], read: Callable[[int], np.ndarray], reads_in_parallel: bool = True):
        self.names, self.read, self.reads_in_parallel = tuple(names), read, reads_in_parallel

    def __len__(self) -> int:
        return len(self.names)


class DatasetVideo(FrameList):
    """One video of a benchmark."""

    def __init__(self, store: FrameStore, video: str, names: Sequence[str]):
        super().__init__(names, lambda index: store.read(video, names[index]))


class VideoPart(FrameList):
    """Some frames of a video, which keep the names that they have in it.

    Args:
        whole: the video.
        frames: which of them, as a slice of their numbers from 0 on.

    Raises:
        ValueError: the slice goes backwards, or gives no frame.
    """

    def __init__(self, whole: VideoSource, frames: slice):
        if frames.step is not None and frames.step < 1:
            raise ValueError(f"every {frames.step}. frame: expected 1 (all) or more")
        self.whole = whole
        self.numbers = numbers = range(len(whole))[frames]
        if not numbers:
            asked = f"from {frames.start or 0} to before {len(whole) if frames.stop is None else frames.stop}"
            raise ValueError(f"no frame {asked}: the video has frames 0 to {len(whole) - 1}")
        names = [whole.names[number] for number in numbers]
        super().__init__(names, lambda index: whole.read(numbers[index]), whole.reads_in_parallel)


VideoInput = str | Path | VideoSource | Sequence[Any] | np.ndarray | Any
"""What ``open_video`` takes; the last are tensors and pictures of libraries that are not loaded for it."""


def open_video(video: VideoInput) -> VideoSource:
    """Anything that is a video.

    Args:
        video: the path of a folder of pictures, a video file, or one picture; an array or tensor (T, H, W, 3) or
            (T, 3, H, W), or a single frame (H, W, 3), uint8 RGB; a Pillow image; a list of paths of pictures, arrays,
            tensors and images; or what reads frames by index already.

    Raises:
        FileNotFoundError: there is nothing at the path, or an empty folder.
        ValueError: it does not decode, or frames in memory are not uint8 RGB.
    """
    if isinstance(video, str | Path):
        return _open_path(video)
    if hasattr(video, "reads_in_parallel"):
        return cast(VideoSource, video)
    if isinstance(video, Image.Image) or len(getattr(video, "shape", ())) == 3:
        video = [video]
    if not isinstance(video, Sequence) and len(getattr(video, "shape", ())) != 4:
        raise ValueError(
            f"a video of type {type(video).__name__}: expected a path, an array (T, H, W, 3), a list of frames or a "
            "picture"
        )
    frames = [_frame(frame, number) for number, frame in enumerate(video)]
    return FrameList(_numbered(len(frames)), frames.__getitem__, reads_in_parallel=False)


def _numbered(count: int) -> list[str]:
    """Names of frames that have none."""
    return [f"{index:05d}" for index in range(count)]


def _frame(frame: Any, number: int) -> np.ndarray:
    """(H, W, 3) uint8 of one frame in any of its forms."""
    if isinstance(frame, str | Path):
        return read_image(expanded(frame), Path(frame).name)
    if isinstance(frame, Image.Image):
        return _upright_rgb(frame)
    array = np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
        raise ValueError(
            f"frame {number} is {array.dtype} of shape {array.shape}; expected uint8 RGB from 0 to 255, (H, W, 3) or "
            "(3, H, W)"
        )
    return np.ascontiguousarray(array)


def _open_path(path: str | Path) -> VideoSource:
    if not str(path):
        raise FileNotFoundError("no video: its name is empty; expected a folder of frames or a video file")
    path = expanded(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no video at {path}; expected a folder of frames or a video file")
    if not path.is_file():
        raise ValueError(f"video {path} is a pipe or a device, and is to be read more than once: save it to a file")
    if path.suffix.lower() in SUFFIXES:
        with open_image(path, path.name) as image:
            count, is_animated = num_pictures(image), getattr(image, "is_animated", False)
            if image.format != "GIF" and not (image.format == "PNG" and is_animated):
                return _picture_video(path, count)
    return FileVideo(path)


def _open_folder(folder: Path) -> VideoSource:
    """The pictures of a folder, whatever their names, in natural order (``img2`` before ``img10``).

    What lies there beside them is left out, which the log says with the names.

    Raises:
        FileNotFoundError: the folder holds no picture, or a link to one that does not exist.
        ValueError: two pictures differ in their suffix alone, so that their masks would get one name.
    """
    entries = sorted(folder.iterdir(), key=lambda entry: (_natural(entry.stem), entry.name))
    # Names that begin with a dot are notes of the system, such as the ._00004.jpg of a Mac. Links to nothing are errors
    # below; folders are left out, and pipes, for which reading would wait.
    pictures = (e for e in entries if e.suffix.lower() in SUFFIXES and e.name[0] != ".")
    files = [e for e in pictures if e.is_file() or not e.exists()]
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no frames; expected files ending in {', '.join(SUFFIXES)}")
    lost = [file for file in files if not file.exists()]
    if lost:
        raise FileNotFoundError(f"{lost[0]} is a link to {os.readlink(lost[0])}, which does not exist")
    names = [file.stem for file in files]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"folder {folder} holds several pictures called {twice[0]!r}; expected one per name")
    known = {file.name for file in files}
    others = [entry.name for entry in entries if entry.name not in known]
    if others:
        named = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
        message = "%s: %d pictures are read; %d other entries are left out: %s"
        log.warning(message, folder, len(files), len(others), named)
    return FrameList(names, lambda index: read_image(files[index], f"{folder.name}/{names[index]}"))


def _picture_video(path: Path, count: int) -> VideoSource:
    """What Pillow reads better than FFmpeg: one picture as a video of one frame, the pages of a TIFF, or the frames of
    an animated WebP, which FFmpeg 8 does not decode."""
    names = _numbered(count)
    if count == 1:
        return FrameList(names, lambda index: read_image(path, path.name), reads_in_parallel=False)
    animation, lock = Image.open(path), threading.Lock()  # its frames build upon each other

    def read(index: int) -> np.ndarray:
        with lock:
            try:
                animation.seek(index)
                return _upright_rgb(animation)
            except (OSError, EOFError, SyntaxError, ValueError) as error:
                raise ValueError(f"frame {index} of video {path} does not decode: {error}") from error

    return FrameList(names, read, reads_in_parallel=False)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


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
        self, video: VideoSource, schedule: Iterable[tuple[int, Sequence[Role]]], prepare: PrepareFrame, ahead: int
    ):
        self._video = video
        self._schedule = iter(schedule)
        self._prepare = prepare
        threads = min(MAX_THREADS, os.cpu_count() or 1) if video.reads_in_parallel else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._coming: deque[Future[Frame]] = deque()
        self._ahead = ahead
        self._order(1)  # whose size tells how many more

    def take(self, index: int) -> Frame:
        """The next frame of the schedule, which must be ``index``.

        Raises:
            ValueError, FileNotFoundError: it cannot be read; the message names it.
        """
        frame = self._coming.popleft().result()
        room = max(1, MAX_AHEAD_BYTES // frame.pixels_HW3.nbytes)
        self._order(max(0, min(self._ahead, room) - len(self._coming)))
        assert frame.index == index, f"frame {index} was asked for, but frame {frame.index} was scheduled"
        return frame

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _order(self, count: int) -> None:
        """Have the next frames of the schedule read, if there are as many."""
        for wanted in islice(self._schedule, count):
            self._coming.append(self._pool.submit(self._read, *wanted))

    def _read(self, index: int, roles: Sequence[Role]) -> Frame:
        pixels = self._video.read(index)
        return Frame(index, pixels, {role: self._prepare(pixels, role) for role in roles})
