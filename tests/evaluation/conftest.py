"""A benchmark of two videos, small enough to know every score by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.masks import encode_rle

SIZES = {"a/one": (16, 20), "b": (12, 14)}
FRAMES = {"a/one": ["00000", "00005", "00010"], "b": ["00000", "00001"]}
EXPRESSIONS = {
    "a/one": {"0": [0], "1": [1], "2": [0, 1], "10": []},
    "b": {"0": [2]},
}
KINDS = {"a/one": {"0": "appearance", "1": "appearance", "2": "multi", "10": "absent"}, "b": {"0": "appearance"}}


def object_masks() -> dict[str, list[np.ndarray | None]]:
    """Two equal boxes far apart in video a/one; one box in b that is absent from the second frame."""
    left, right = np.zeros((2, 16, 20), np.uint8)
    left[4:9, 3:7] = 1
    right[4:9, 13:17] = 1
    box = np.zeros((12, 14), np.uint8)
    box[2:6, 2:6] = 1
    return {"0": [left] * 3, "1": [right] * 3, "2": [box, None]}


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetConfig:
    """The benchmark on disk, in the MeViS layout."""
    split = tmp_path / "tiny" / "valid"
    for video, frames in FRAMES.items():
        folder = split / "JPEGImages" / video
        folder.mkdir(parents=True)
        for frame in frames:
            Image.fromarray(np.zeros((*SIZES[video], 3), np.uint8)).save(folder / f"{frame}.jpg")
    videos = {
        video: {
            "vid_id": number,
            "frames": FRAMES[video],
            "expressions": {
                exp_id: {"exp": f"sentence {exp_id}", "obj_id": ids, "anno_id": ids}
                for exp_id, ids in expressions.items()
            },
        }
        for number, (video, expressions) in enumerate(EXPRESSIONS.items())
    }
    masks = {name: [None if m is None else encode(m) for m in frames] for name, frames in object_masks().items()}
    (split / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (split / "mask_dict.json").write_text(json.dumps(masks))
    (split / "kinds.json").write_text(json.dumps(KINDS))
    return DatasetConfig("tiny", Layout.mevis, str(tmp_path / "tiny"), "valid", groups="kinds.json")


def encode(mask: np.ndarray) -> dict[str, object]:
    return {"size": list(mask.shape), "counts": encode_rle(mask)}


@pytest.fixture
def perfect(dataset: DatasetConfig, tmp_path: Path) -> Path:
    """Predictions equal to the ground truth."""
    folder = tmp_path / "perfect"
    masks = open_masks(dataset)
    for expression in read_expressions(dataset):
        size = SIZES[expression.video]
        target = masks.read(expression, range(len(expression.frames)), size)
        for frame, mask in zip(expression.frames, target, strict=True):
            path = folder / expression.video / expression.exp_id / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask * 255).save(path)
    return folder
