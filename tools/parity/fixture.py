"""A folder of recorded numbers, read strictly: what is asked for is there in the expected form, or the error says so.

All sizes, counts and cases come from the files.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glus.config import SegmenterConfig
from glus.files import read_json

T = TypeVar("T")
DTYPE = "float32"
"""The gates hold for it alone."""


class Record:
    """A JSON object whose fields are read by name and type.

    Args:
        values: the object.
        where: file (and entry) for messages.

    Raises:
        ValueError: it is no object.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values: dict[str, Any] = values
        self.where = where

    def get(self, key: str, kind: type[T]) -> T:
        """The value of ``key``.

        Raises:
            ValueError: it is missing or of another type.
        """
        if key not in self.values:
            raise ValueError(f"{self.where}: no {key!r}; it has {', '.join(self.values)}")
        value = self.values[key]
        value = float(value) if kind is float and isinstance(value, int) else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}: {key!r} is {value!r}; expected {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key``; None where it is missing or null.

        Raises:
            ValueError: it is of another type.
        """
        return None if self.values.get(key) is None else self.get(key, kind)

    def record(self, key: str) -> Record:
        """The object below ``key``."""
        return Record(self.get(key, dict), f"{self.where}: {key}")


class Arrays:
    """The arrays of an ``.npz`` file, read when asked for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no archive of arrays.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with np.load(path) as archive:
                self.names: tuple[str, ...] = tuple(archive.files)
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not decode as .npz: {error}") from error
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        """One array.

        Raises:
            ValueError: the file has none of this name, or it does not decode.
        """
        if name not in self.names:
            raise ValueError(f"{self.path} has no array {name!r}; it has {', '.join(self.names)}")
        try:
            with np.load(self.path) as archive:
                return archive[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: array {name!r} does not decode: {error}") from error


def read_records(path: Path) -> list[Record]:
    """The objects of a JSON file that holds a list of them.

    Raises:
        FileNotFoundError, ValueError: see ``read_json``; or it is no list of objects.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list, found {type(content).__name__}")
    return [Record(entry, f"{path}: entry {number}") for number, entry in enumerate(content)]


def unpack(bits: np.ndarray, width: int, what: str) -> np.ndarray:
    """bool masks (..., H, W) from ``np.packbits(axis=-1)`` of them, (..., H, ceil(W / 8)) uint8.

    Raises:
        ValueError: the last axis does not fit ``width``.
    """
    if bits.dtype != np.uint8 or bits.shape[-1] != -(-width // 8):
        raise ValueError(
            f"{what}: packed masks are {bits.dtype} {bits.shape}; expected uint8 with {-(-width // 8)} bytes a row "
            f"for a width of {width}"
        )
    return np.unpackbits(bits, axis=-1, count=width).astype(bool)


@dataclass(frozen=True)
class Fixture:
    """``fixture.json``: the settings under which everything in a folder was recorded."""

    folder: Path
    num_context: int
    num_query: int
    height: int
    width: int
    num_frames: int
    checkpoint: Path
    """Merged model in the release's layout."""
    clip: Path
    frames: Path
    """The video, one picture per frame."""
    segmenter: SegmenterConfig
    sam2_weights: Path | None
    """The same SAM2 tensors as in the checkpoint, as SAM2 itself stores them; None if the folder leaves them out."""


def read_fixture(folder: Path) -> Fixture:
    """Read ``fixture.json`` and the SAM2 architecture it names.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a setting is missing or of another type, or the numbers are not float32.
    """
    settings = Record(read_json(folder / "fixture.json"), str(folder / "fixture.json"))
    if settings.get("dtype", str) != DTYPE:
        raise ValueError(f"{settings.where}: dtype is {settings.values['dtype']}; the gates hold for {DTYPE} alone")
    sam2 = settings.record("sam2")
    architecture_path = folder / sam2.get("config", str)
    architecture = Record(read_json(architecture_path), str(architecture_path))
    weights = sam2.optional("weights", str)
    return Fixture(
        folder=folder,
        num_context=settings.get("num_context", int),
        num_query=settings.get("num_query", int),
        height=settings.get("height", int),
        width=settings.get("width", int),
        num_frames=settings.get("num_frames", int),
        checkpoint=folder / settings.get("checkpoint", str),
        clip=folder / settings.get("clip", str),
        frames=folder / settings.get("frames", str),
        segmenter=SegmenterConfig(architecture.get("variant", str), architecture.get("overrides", dict)),
        sam2_weights=folder / weights if weights else None,
    )
