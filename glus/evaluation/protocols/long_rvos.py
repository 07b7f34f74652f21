"""Long-RVOS: J and F, and how well an answer is placed in time.

Source: iSEE-Laboratory/Long_RVOS, eval/eval_long_rvos. With G and P the sets of frames that have foreground in the
ground truth and in the prediction: tIoU = |G & P| / |G | P|, vIoU = (sum of J over G & P) / |G | P|; both are 1 where
both sets are empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glus.evaluation.measured import Measured
from glus.evaluation.protocols.rules import Rules
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, by_group, mean_of


def measure(measured: Measured) -> dict[str, float | None]:
    """``tiou`` and ``viou`` of one expression."""
    visible_T, answered_T = measured.visible_T, measured.answered_T
    both_T = visible_T & answered_T
    num_frames = int(np.count_nonzero(visible_T | answered_T))
    if num_frames == 0:
        return {"tiou": 1.0, "viou": 1.0}
    viou = float(measured.frames.j_T[both_T].sum() / num_frames)
    return {"tiou": int(np.count_nonzero(both_T)) / num_frames, "viou": viou}


def tables(scores: Sequence[ExpressionScore], _objects: Sequence[ObjectScore] = ()) -> list[ScoreTable]:
    """A row per type of expression and one over all."""
    rows: dict[str, dict[str, float]] = {}
    for name, chosen in {**by_group(scores), "overall": list(scores)}.items():
        j, f = mean_of(score.j for score in chosen), mean_of(score.f for score in chosen)
        tiou, viou = (mean_of(score.measures[key] for score in chosen) for key in ("tiou", "viou"))
        rows[name] = {"J": j, "F": f, "J&F": (j + f) / 2, "tIoU": tiou, "vIoU": viou, "num": len(chosen)}
    return [ScoreTable("long_rvos", "Long-RVOS", rows, "overall: mean over all expressions, as the official script.")]


RULES = Rules("J&F: mean over all frames, then over expressions", measure=measure, tables=tables)
