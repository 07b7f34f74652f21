"""Frames as RGB pixels: of a benchmark by video and name, of anybody's folder or video file by index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from glus.config import DatasetConfig
from glus.data.benchmarks.index import LAYOUTS, image_folder
from glus.data.video_file import FileVideo

SUFFIXES = (".jpg", ".jpeg", ".png")


def read_image(path: Path, name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Args:
        path: a picture file.
        name: how the error message calls it, e.g. ``mevis/0a1b2c/00012``.

    Raises:
        ValueError: the file does not decode (cut short, corrupt, not a picture).
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"frame {name} does not decode: {path}: {error}") from error


class FrameStore:
    """The frames of one split: ``<images>/<video>/<frame>.jpg`` (or .png).

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
        for suffix in SUFFIXES:
            path = folder / f"{frame}{suffix}"
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"frame {self.name}/{video}/{frame} is missing; expected {folder / frame}.jpg (or .jpeg, .png)"
        )

    def read(self, video: str, frame: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file does not decode.
        """
        return read_image(self.path(video, frame), f"{self.name}/{video}/{frame}")

    def size(self, video: str, frame: str) -> tuple[int, int]:
        """(H, W) from the file's header, without decoding the pixels."""
        path = self.path(video, frame)
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"frame {self.name}/{video}/{frame} has no readable header: {path}: {error}") from error


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

    Raises:
        FileNotFoundError: the folder does not exist or holds no picture.
        ValueError: two pictures differ in their suffix alone, so that their masks would get one name.
    """

    reads_in_parallel = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no folder of frames at {self.path}")
        files = [file for file in self.path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            raise FileNotFoundError(
                f"folder {self.path} holds no frames; expected files ending in {', '.join(SUFFIXES)}"
            )
        self._files = sorted(files, key=lambda file: (_natural(file.stem), file.name))
        self.names = tuple(file.stem for file in self._files)
        twice = sorted({name for name in self.names if self.names.count(name) > 1}) if _has_twins(self.names) else []
        if twice:
            raise ValueError(f"folder {self.path} holds several pictures called {twice[0]!r}; expected one per name")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of frame ``index``."""
        return read_image(self._files[index], f"{self.path.name}/{self.names[index]}")


def open_video(path: str | Path) -> VideoSource:
    """A folder of pictures or a video file.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or an empty folder.
        ValueError: it does not decode.
    """
    if Path(path).is_dir():
        return FolderVideo(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"no video at {path}; expected a folder of frames or a video file")
    return FileVideo(path)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _has_twins(names: Sequence[str]) -> bool:
    return len(set(names)) != len(names)
