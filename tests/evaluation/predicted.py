"""Writers of predictions in both forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from glus.config import DatasetConfig
from glus.data.benchmarks.index import read_expressions
from glus.data.masks import encode_rle
from glus.types import Expression
from tests.layouts import Written

Masks = dict[tuple[str, str], np.ndarray]
"""(T, H, W) by video and exp_id."""


def true_masks(written: Written) -> Masks:
    """Copies of the ground truth, to be changed into predictions."""
    return {key: truth.masks_THW.copy() for key, truth in written.truth.items()}


def write_png(
    folder: Path, dataset: DatasetConfig, masks: Mapping[tuple[str, str], np.ndarray], value: int = 255
) -> Path:
    """``<prediction_dir>/<frame>.png`` of 0 and ``value``."""
    for expression in read_expressions(dataset):
        place = folder / expression.prediction_dir
        place.mkdir(parents=True)
        for frame, mask in zip(expression.frames, masks[expression.video, expression.exp_id], strict=True):
            Image.fromarray(mask.astype(np.uint8) * np.uint8(value)).save(place / f"{frame}.png")
    return folder


def write_rle(folder: Path, dataset: DatasetConfig, masks: Mapping[tuple[str, str], np.ndarray]) -> Path:
    """``<video>.jsonl``, a line per expression and frame, the last expression first."""
    videos: dict[str, list[Expression]] = {}
    for expression in read_expressions(dataset):
        videos.setdefault(expression.video, []).insert(0, expression)
    for video, expressions in videos.items():
        path = folder / f"{video}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [rle_line(e, frame, masks[video, e.exp_id]) for e in expressions for frame in range(len(e.frames))]
        path.write_text("".join(f"{line}\n" for line in lines))
    return folder


def rle_line(expression: Expression, frame: int, masks_THW: np.ndarray) -> str:
    """One line of a file of run-length codes."""
    content = {
        "frame": expression.frames[frame],
        "size": list(masks_THW.shape[1:]),
        "masks": {expression.exp_id: encode_rle(masks_THW[frame])},
        "scores": {expression.exp_id: 0.9},
        "has_seg": {expression.exp_id: True},
    }
    return json.dumps(content)
