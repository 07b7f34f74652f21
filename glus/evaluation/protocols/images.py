"""Pictures (RefCOCO, RefCOCO+, RefCOCOg, ReasonSeg): cIoU and gIoU as LISA computes them.

Source: dvlab-research/LISA, train_ds.py ``validate``. cIoU is the sum of all intersections over the sum of all unions,
gIoU the mean over sentences of I / (U + 1e-5), which is 1 where the union is empty. The area to be ignored (ReasonSeg)
counts nowhere. LISA sums in float32 on the GPU, we in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from glus.evaluation.measured import Measured
from glus.evaluation.protocols.rules import Rules
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, by_group, mean_of

SMALL = 1e-5
"""Added to the union in gIoU; in cIoU it is 1e-10."""


def measure(measured: Measured) -> dict[str, float | None]:
    """``intersection`` and ``union`` in pixels and ``iou`` of one sentence about one picture."""
    intersection, union = (int(counts.sum()) for counts in (measured.frames.intersection_T, measured.frames.union_T))
    iou = 1.0 if union == 0 else intersection / (union + SMALL)
    return {"intersection": intersection, "union": union, "iou": 0.0 if measured.unusable_T.any() else iou}


def tables(scores: Sequence[ExpressionScore], _objects: Sequence[ObjectScore] = ()) -> list[ScoreTable]:
    """A row per group, where there are groups, and one over all."""
    rows: dict[str, dict[str, float]] = {}
    for name, chosen in {**by_group(scores), "overall": list(scores)}.items():
        intersection, union = (sum(score.measures[key] or 0 for score in chosen) for key in ("intersection", "union"))
        rows[name] = {
            "cIoU": intersection / (union + 1e-10) if chosen else math.nan,
            "gIoU": mean_of(score.measures["iou"] for score in chosen),
            "num": len(chosen),
        }
    return [ScoreTable("images", "cIoU and gIoU", rows)]


RULES = Rules("J&F of each picture, then mean over expressions", is_ignoring=True, measure=measure, tables=tables)
