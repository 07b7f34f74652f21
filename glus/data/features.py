"""Features of frozen towers on disk, one file per video, so that training encodes no frame twice.

What CLIP makes of a frame before the projector, and what SAM2's image encoder makes of it, depend on the frame, the
frozen weights and the settings alone. ``tools/cache_features.py`` writes them once::

    <folder>/<part>/<key>/<dataset>/<video>.safetensors      features (frames, ...) in the tower's own type
                                                             metadata: names of the frames, bytes of their files

The key stands for weights, settings and precision (``models/features.py``). Frames are mapped, not read whole. At full
size in bfloat16 a frame is 131 kB of CLIP features and 8.4 MB of SAM2's: those of MeViS and Ref-YouTube-VOS together
take about 30 GB and 2 TB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glus.config import FeatureCacheConfig
from glus.data.frames import FrameStore
from glus.files import whole_file

COMMAND = "python tools/cache_features.py, with the overrides of this training,"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_TENSOR = "features"


class FeatureStore:
    """Features of one part of the model for the frames of one split.

    Args:
        folder: of this part, key and split.
        frames: the split's frames, whose files must be those that were encoded.
    """

    def __init__(self, folder: Path, frames: FrameStore):
        self.folder = folder
        self._frames = frames

    def path(self, video: str) -> Path:
        """The file of a video."""
        return self.folder / f"{video}.safetensors"

    def require(self, videos: Sequence[str]) -> None:
        """Raise unless there is a file for each video.

        Raises:
            FileNotFoundError: one is missing.
        """
        missing = [video for video in videos if not self.path(video).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(videos)} videos are not in the feature cache, the first is "
                f"{self._frames.name}/{missing[0]} (expected {self.path(missing[0])}); {COMMAND} adds them"
            )

    def read(self, video: str, names: Sequence[str]) -> torch.Tensor:
        """Features of some frames of a video, (F, ...) in the type they were made in, also of no frame.

        Raises:
            FileNotFoundError: the video or a frame's picture is missing.
            ValueError: the file is damaged, lacks a frame, or a picture is no longer the one that was encoded.
        """
        file = self._open(video)
        rows, features = self._rows(file, video, names), file.get_slice(_TENSOR)
        return torch.cat([features[:0], *(features[row : row + 1] for row in rows)])

    def is_complete(self, video: str, names: Sequence[str]) -> bool:
        """Whether the video's file can be read and holds these frames as they are now."""
        try:
            self._rows(self._open(video), video, names)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _open(self, video: str) -> safe_open:
        self.require([video])
        try:
            return safe_open(self.path(video), framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"features {self.path(video)} do not decode (cut short?): {error}; {COMMAND} makes them anew"
            ) from error

    def _rows(self, file: safe_open, video: str, names: Sequence[str]) -> list[int]:
        """The row of each frame in a video's file."""
        known: dict[str, int] = json.loads(file.metadata()["file_bytes"])
        for name in names:
            frame = f"frame {self._frames.name}/{video}/{name}"
            if name not in known:
                raise ValueError(f"{frame} is not in {self.path(video)}; {COMMAND} adds it")
            size = self._file_bytes(video, name)
            if size != known[name]:
                raise ValueError(
                    f"{frame} is not the one that was encoded into {self.path(video)}: its file has {size} bytes, "
                    f"it had {known[name]}; {COMMAND} encodes it anew"
                )
        row = {name: number for number, name in enumerate(known)}
        return [row[name] for name in names]

    def _file_bytes(self, video: str, name: str) -> int:
        return self._frames.path(video, name).stat().st_size

    def write(self, video: str, names: Sequence[str], features: Iterator[torch.Tensor]) -> None:
        """Write a video's file whole or not at all; two processes must not do so at once.

        Args:
            video: its id.
            names: of all its frames.
            features: of the frames in this order, (f, ...) at a time, on the CPU; all of one type and shape.

        Raises:
            FileNotFoundError: a frame is missing.
            OSError: the file cannot be written.
        """
        path = self.path(video)
        known = {name: self._file_bytes(video, name) for name in names}
        with whole_file(path) as temporary, temporary.open("wb") as file:
            first = next(features)
            file.write(_header(first, known))
            count = 0
            for rows in _chain(first, features):
                file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
                count += len(rows)
            assert count == len(names), (video, count, len(names))


def open_features(
    cache: FeatureCacheConfig, keys: Mapping[str, str], frames: FrameStore, videos: Sequence[str]
) -> dict[str, FeatureStore]:
    """The features to train with, by part: none where there is no cache.

    Args:
        cache: where it is, and which parts are read from it.
        keys: part -> key of the model's weights and settings.
        frames: of the split.
        videos: all that may be drawn from it.

    Raises:
        FileNotFoundError: nothing was written for a part, or not all of these videos.
        ValueError: what was written is of other weights or settings.
    """
    stores = {part: feature_store(cache, part, keys[part], frames) for part in cache.used_parts()}
    for part, store in stores.items():
        _require_key(store.folder.parent, part)
        store.require(videos)
    return stores


def feature_store(cache: FeatureCacheConfig, part: str, key: str, frames: FrameStore) -> FeatureStore:
    """Where the features of a split lie, or are to be written."""
    assert cache.folder is not None
    return FeatureStore(Path(cache.folder) / part / key / frames.name, frames)


def _require_key(folder: Path, part: str) -> None:
    if folder.is_dir():
        return
    others = sorted(path.name for path in folder.parent.glob("*"))
    if not others:
        raise FileNotFoundError(f"the feature cache has no {part} features: {folder} is missing; {COMMAND} makes them")
    raise ValueError(
        f"the feature cache {folder.parent} holds {part} features of key {', '.join(others)}, but this model's "
        f"weights, settings and precision have key {folder.name}; {COMMAND} makes those"
    )


def _header(first: torch.Tensor, known: Mapping[str, int]) -> bytes:
    """The head of a safetensors file with one tensor: https://huggingface.co/docs/safetensors."""
    shape = [len(known), *first.shape[1:]]
    num_bytes = len(known) * first[0].nbytes
    tensor = {"dtype": _DTYPE_NAMES[first.dtype], "shape": shape, "data_offsets": [0, num_bytes]}
    text = json.dumps({"__metadata__": {"file_bytes": json.dumps(known)}, _TENSOR: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chain(first: torch.Tensor, others: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield first
    yield from others
