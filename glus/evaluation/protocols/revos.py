"""ReVOS: J, F, pixel accuracy A and robustness R of referring and of reasoning expressions.

Source: cilinyan/VISA, tools/eval_revos.py and tools/metrics.py. For each frame, with prediction P, ground truth G and
foreground S (all annotated objects of the video): A = share of pixels where P equals G,
R = max(1 - |P without G| / (|S| + 1e-6), 0). The script rounds each expression's percent to two decimals before it
averages; "overall" is the mean of the two groups; expressions about things that do not exist are in no mean.

The script compares pixel *values*: with masks of 0/255, which the authors write, A counts every foreground pixel as
wrong, and R weighs each false pixel 255 times (and wraps around in 8 bits where objects overlap). Published A and R are
of that kind or of 0/1 masks, depending on who wrote them. A01 and R01 are what the formulas mean; A255 and R255 are the
script's values for 0/255 masks, for comparison with papers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from glus.config import DatasetConfig
from glus.data.rle import Size, unpack_runs
from glus.evaluation.measured import Chunk, Measured, Observed
from glus.evaluation.packed import region_counts
from glus.evaluation.protocols.rules import Rules
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, mean_of
from glus.files import read_object

FOREGROUND_FILE = "mask_dict_foreground.json"
GROUPS = ("referring", "reasoning")
"""The groups that count; the reader names them after ``type_id`` 0 and 1."""
COLUMNS = {
    "J": "j", "F": "f", "J&F": None, "A01": "a01", "R01": "r01", "legacy A255": "a255", "legacy R255": "r255",
}  # fmt: skip
"""Columns of the tables, and the measure that each averages; J&F is the mean of the averages of J and F."""


class Foreground:
    """Area of all annotated objects of a video, frame by frame, from ``mask_dict_foreground.json``.

    The file is read once per process, on first use.
    """

    def __init__(self, dataset: DatasetConfig):
        self.path = Path(dataset.root) / FOREGROUND_FILE
        self._videos: dict[str, Any] | None = None

    def __call__(self, chunk: Chunk) -> Observed:
        """``foreground``, (F,) int64 pixels, and ``overlap``, (F, E) int64: the pixels that each expression's
        prediction shares with each of its objects, summed over the objects."""
        video, frames = chunk.expressions[0].video, chunk.expressions[0].frames
        codes = self._codes(video, len(frames))
        areas = [self._area(codes[frame], chunk.size, f"{video}, frame {frames[frame]}") for frame in chunk.frames]
        overlaps = [_overlap(chunk, index) for index in range(len(chunk.expressions))]
        return {"foreground": np.array(areas, np.int64), "overlap": np.stack(overlaps, axis=1)}

    def _codes(self, video: str, num_frames: int) -> list[Any]:
        if self._videos is None:
            if not self.path.is_file():
                raise FileNotFoundError(
                    f"no file {self.path}; the robustness score of ReVOS needs it (it comes with the masks)"
                )
            self._videos = read_object(self.path)
        entry = self._videos.get(video)
        codes = entry.get("masks_rle") if isinstance(entry, dict) else None
        if not isinstance(codes, list) or len(codes) != num_frames:
            found = f"{len(codes)} masks" if isinstance(codes, list) else "none"
            raise ValueError(
                f"{self.path}: expected masks_rle of {num_frames} frames for video {video!r}, found {found}"
            )
        return codes

    def _area(self, code: Any, size: Size, place: str) -> int:
        """Pixels of one code, or the sum over a list of them (the script adds those up)."""
        if isinstance(code, list):
            return sum(self._area(part, size, place) for part in code)
        if not isinstance(code, dict) or list(code.get("size", [])) != list(size):
            raise ValueError(
                f"{self.path}, {place}: expected a run-length code of size {list(size)}, found {code!r:.80}"
            )
        try:
            return int(unpack_runs(code["counts"])[1::2].sum())
        except ValueError as error:
            raise ValueError(f"{self.path}, {place}: {error}") from error


def measure(measured: Measured) -> dict[str, float | None]:
    """A and R of one expression, on 0/1 and (legacy) on 0/255."""
    frames, num_pixels = measured.frames, measured.size[0] * measured.size[1]
    different_T = frames.union_T - frames.intersection_T
    false_T = frames.prediction_T - frames.intersection_T
    # (1 - G) * 255 in 8 bits: 255 where no object is, and (number of objects - 1) where there are some.
    legacy_T = 255 * false_T + measured.observed["overlap"][:, measured.index] - frames.intersection_T
    foreground_T = measured.observed["foreground"]
    per_frame = {
        "a01": (num_pixels - different_T) / num_pixels,
        "r01": _robustness(false_T, foreground_T),
        "a255": (num_pixels - frames.union_T) / num_pixels,
        "r255": _robustness(legacy_T, foreground_T),
    }
    return {name: float(np.mean(np.where(measured.unusable_T, 0.0, values))) for name, values in per_frame.items()}


def tables(scores: Sequence[ExpressionScore], _objects: Sequence[ObjectScore] = ()) -> list[ScoreTable]:
    """The script's own numbers, and the same without its rounding."""
    official = _table(scores, lambda value: float(np.round(100 * value, 2)) / 100)
    exact = _table(scores, lambda value: value)
    note = "overall: mean of both groups. A255, R255: only to compare with papers that scored 0/255 masks."
    return [
        ScoreTable("revos", "ReVOS (official: percents of expressions rounded first)", official, note),
        ScoreTable("revos_unrounded", "ReVOS, not rounded", exact),
    ]


def _table(scores: Sequence[ExpressionScore], rounded: Callable[[float], float]) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        chosen = [score for score in scores if score.group == group]
        row = {
            column: mean_of(rounded(_value(score, name)) for score in chosen)
            for column, name in COLUMNS.items()
            if name
        }
        rows[group] = {column: row.get(column, (row["J"] + row["F"]) / 2) for column in COLUMNS}
        rows[group]["num"] = len(chosen)
    first, second = (rows[group] for group in GROUPS)
    rows["overall"] = {column: (first[column] + second[column]) / 2 for column in COLUMNS}
    rows["overall"]["num"] = int(first["num"] + second["num"])
    return rows


def _value(score: ExpressionScore, name: str) -> float:
    value = {"j": score.j, "f": score.f, **score.measures}[name]
    assert value is not None
    return value


def _robustness(false_T: np.ndarray, foreground_T: np.ndarray) -> np.ndarray:
    return np.maximum(1 - false_T / (foreground_T + 1e-6), 0.0)


def _overlap(chunk: Chunk, index: int) -> np.ndarray:
    expression, prediction = chunk.expressions[index], chunk.predictions[index]
    objects = [replace(expression, annotation_ids=(name,)) for name in expression.annotation_ids]
    shared = [region_counts(prediction, chunk.target(one))[0] for one in objects]
    return np.array(shared, np.int64).reshape(-1, len(chunk.frames)).sum(axis=0)


RULES = Rules(
    "J&F: mean over all frames, then over all expressions (not what ReVOS reports, see below)",
    open_observer=Foreground,
    measure=measure,
    tables=tables,
)
