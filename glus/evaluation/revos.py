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

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glus.data.rle import Size, unpack_runs
from glus.evaluation.packed import region_counts
from glus.evaluation.protocols import Chunk, JFProtocol, Measured, Observed
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, mean_of
from glus.files import read_object

FOREGROUND_FILE = "mask_dict_foreground.json"
"""Area of all annotated objects of each video, frame by frame."""
GROUPS = ("referring", "reasoning")
"""The groups that count; the reader names them after ``type_id`` 0 and 1."""
MEASURES = {"A01": "a01", "R01": "r01", "legacy A255": "a255", "legacy R255": "r255"}
"""Columns of the tables beside J and F, and the measure that each averages."""


class RevosProtocol(JFProtocol):
    """A and R, on 0/1 and (legacy) on 0/255."""

    title = "J&F: mean over all frames, then over all expressions (not what ReVOS reports, see below)"

    def observe(self, chunk: Chunk) -> Observed:
        """``foreground``, (F,) int64 pixels, and ``overlap``, (F, E) int64: the pixels that each expression's
        prediction shares with each of its objects, summed over the objects."""
        video, frames = chunk.expressions[0].video, chunk.expressions[0].frames
        codes = self._codes(video, len(frames))
        areas = [self._area(codes[frame], chunk.size, f"{video}, frame {frames[frame]}") for frame in chunk.frames]
        overlaps = [_overlap(chunk, index) for index in range(len(chunk.expressions))]
        return {"foreground": np.array(areas, np.int64), "overlap": np.stack(overlaps, axis=1)}

    def measure(self, measured: Measured) -> dict[str, float | None]:
        """A and R of one expression."""
        frames, num_pixels = measured.frames, measured.size[0] * measured.size[1]
        different_T = frames.union_T - frames.intersection_T
        false_T = frames.prediction_T - frames.intersection_T
        # (1 - G) * 255 in 8 bits: 255 where no object is, and (number of objects - 1) where there are some.
        legacy_T = 255 * false_T + measured.observed["overlap"][:, measured.index] - frames.intersection_T
        foreground_T = measured.observed["foreground"] + 1e-6
        per_frame = {
            "a01": (num_pixels - different_T) / num_pixels,
            "r01": np.maximum(1 - false_T / foreground_T, 0.0),
            "a255": (num_pixels - frames.union_T) / num_pixels,
            "r255": np.maximum(1 - legacy_T / foreground_T, 0.0),
        }
        return {name: float(np.mean(np.where(measured.unusable_T, 0.0, values))) for name, values in per_frame.items()}

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """The script's own numbers, and the same without its rounding."""
        note = "overall: mean of both groups. A255, R255: only to compare with papers that scored 0/255 masks."
        official, exact = (_rows(scores, is_rounding) for is_rounding in (True, False))
        return [
            ScoreTable("revos", "ReVOS (official: percents of expressions rounded first)", official, note),
            ScoreTable("revos_unrounded", "ReVOS, not rounded", exact),
        ]

    @cached_property
    def _foreground(self) -> dict[str, Any]:
        path = Path(self.dataset.root) / FOREGROUND_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; the robustness score of ReVOS needs it (it comes with the masks)")
        return read_object(path)

    def _codes(self, video: str, num_frames: int) -> list[Any]:
        entry = self._foreground.get(video)
        codes = entry.get("masks_rle") if isinstance(entry, dict) else None
        if not isinstance(codes, list) or len(codes) != num_frames:
            found = f"{len(codes)} masks" if isinstance(codes, list) else "none"
            path = Path(self.dataset.root) / FOREGROUND_FILE
            raise ValueError(f"{path}: expected masks_rle of {num_frames} frames for video {video!r}, found {found}")
        return codes

    def _area(self, code: Any, size: Size, place: str) -> int:
        """Pixels of one code, or the sum over a list of them (the script adds those up)."""
        if isinstance(code, list):
            return sum(self._area(part, size, place) for part in code)
        where = f"{Path(self.dataset.root) / FOREGROUND_FILE}, {place}"
        if not isinstance(code, dict) or list(code.get("size", [])) != list(size):
            raise ValueError(f"{where}: expected a run-length code of size {list(size)}, found {code!r:.80}")
        try:
            return int(unpack_runs(code["counts"])[1::2].sum())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _overlap(chunk: Chunk, index: int) -> np.ndarray:
    expression, prediction = chunk.expressions[index], chunk.predictions[index]
    objects = [replace(expression, annotation_ids=(name,)) for name in expression.annotation_ids]
    shared = [region_counts(prediction, chunk.target(one))[0] for one in objects]
    return np.array(shared, np.int64).reshape(-1, len(chunk.frames)).sum(axis=0)


def _rows(scores: Sequence[ExpressionScore], is_rounding: bool) -> dict[str, dict[str, float]]:
    """By group and overall, the means of each column."""

    def mean(values: Sequence[float | None]) -> float:
        return mean_of(float(np.round(100 * v, 2)) / 100 if is_rounding and v is not None else v for v in values)

    rows: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        chosen = [score for score in scores if score.group == group]
        j, f = mean([score.j for score in chosen]), mean([score.f for score in chosen])
        others = {column: mean([score.measures[name] for score in chosen]) for column, name in MEASURES.items()}
        rows[group] = {"J": j, "F": f, "J&F": (j + f) / 2, **others, "num": len(chosen)}
    first, second = rows.values()
    overall = {column: (first[column] + second[column]) / 2 for column in first}
    return {**rows, "overall": {**overall, "num": int(first["num"] + second["num"])}}
