"""What a split on disk is, what must be read of it, and the files of which it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glus.config import DatasetConfig, Layout
from tests.layouts.videos import Video


@dataclass(frozen=True)
class Truth:
    """What must be read of an expression."""

    text: str
    masks_THW: np.ndarray
    """bool."""
    object_ids: tuple[int, ...] = ()
    group: str = ""
    ignore_THW: np.ndarray | None = None
    """bool; None where the layout has no such pixels."""
    folder: str = ""
    """Where its prediction lies, if not in ``<video>/<exp_id>``."""


@dataclass(frozen=True)
class Written:
    """A split on disk."""

    dataset: DatasetConfig
    truth: dict[tuple[str, str], Truth]
    """By (video, exp_id), in the order in which the expressions must be read."""
    frames: dict[str, tuple[str, ...]]
    """Names of every video's frames."""


def split_of(
    layout: Layout, root: Path, split: str, videos: Sequence[Video], truth: dict[tuple[str, str], Truth]
) -> Written:
    dataset = DatasetConfig(name=layout.value, layout=layout, root=str(root), split=split)
    return Written(dataset, truth, {video.name: video.frames for video in videos})


def write_expressions(path: Path, videos: Sequence[Video], values: Mapping[tuple[str, str], Any]) -> None:
    """The usual expression file; ids in an order that is not numeric."""
    entries = {
        video.name: {
            "expressions": {exp_id: value for (name, exp_id), value in reversed(values.items()) if name == video.name},
            "frames": list(video.frames),
        }
        for video in videos
    }
    write_json(path, {"videos": entries})


def write_frames(folder: Path, video: Video) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(video.frames, video.pixels_THW3, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)


def write_palettes(folder: Path, frames: Sequence[str], ids_THW: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in zip(frames, ids_THW, strict=True):
        image = Image.fromarray(ids)
        image.putpalette([value for i in range(256) for value in ((255 - i, i, 7) if i else (0, 0, 0))])
        image.save(folder / f"{name}.png")


def write_grey(folder: Path, frames: Sequence[str], masks_THW: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(frames, masks_THW, strict=True):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}.png")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
