"""What a benchmark adds to J and F of every expression; the small protocols, of which none looks at other files.

MeViS v2: sentences that fit nothing, and how often an answer is rightly empty or rightly not. N-acc and T-acc are those
of GRES (Liu et al., CVPR 2023) with a whole video in the place of an image, and Final = (J&F + N-acc + T-acc) / 3,
which holds for the published rows of the LSVOS 2026 challenge. Nothing public says whether J&F is averaged over the
sentences that fit nothing (where an empty answer has J = F = 1), so both are given.

Long-RVOS (iSEE-Laboratory/Long_RVOS, eval/eval_long_rvos): how well an answer is placed in time. With G and P the sets
of frames that have foreground in the ground truth and in the prediction: tIoU = |G & P| / |G | P|, vIoU = (sum of J
over G & P) / |G | P|; both are 1 where both sets are empty.

Pictures (RefCOCO, RefCOCO+, RefCOCOg, ReasonSeg; dvlab-research/LISA, train_ds.py ``validate``): cIoU is the sum of all
intersections over the sum of all unions, gIoU the mean over sentences of I / (U + 1e-5), which is 1 where the union is
empty. The area to be ignored (ReasonSeg) counts nowhere. LISA sums in float32 on the GPU, we in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from glus.config import DatasetConfig
from glus.data.mask_store import MaskStore
from glus.data.rle import Size
from glus.evaluation.packed import BitMasks, JFScores
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, by_group, mean_jf, mean_of, summarize
from glus.types import Expression

Observed = dict[str, np.ndarray]
"""What a benchmark measures besides, by name; the first axis of each array is frames."""
SMALL = 1e-5
"""Added to the union in gIoU; in cIoU it is 1e-10."""


@dataclass(frozen=True)
class Chunk:
    """Some frames of a video, with the predictions for all its expressions."""

    expressions: Sequence[Expression]
    frames: range
    size: Size
    predictions: Sequence[BitMasks]
    """F masks per expression; empty where a frame could not be read."""
    target: Callable[[Expression], BitMasks]
    """Ground truth in these frames, of an expression, or of one that names other objects."""
    masks: MaskStore


@dataclass(frozen=True)
class Measured:
    """What was counted of one expression over its whole video."""

    expression: Expression
    index: int
    """Place of the expression in the video."""
    size: Size
    frames: JFScores
    """Of the frames for which there is a ground truth. J and F are 0 in frames that could not be read."""
    unusable_T: np.ndarray
    """bool: frames whose prediction could not be read; by every measure they count as the worst answer."""
    problems: tuple[str, ...]
    """A line for each of these."""
    observed: Observed
    """What the benchmark measures besides, for the whole video."""

    @property
    def visible_T(self) -> np.ndarray:
        """bool: frames in which an object is to be seen."""
        return self.frames.target_T > 0

    @property
    def answered_T(self) -> np.ndarray:
        """bool: frames with predicted foreground; the opposite of what is right where no prediction could be read."""
        return np.where(self.unusable_T, ~self.visible_T, self.frames.prediction_T > 0)


class JFProtocol:
    """J and F alone, and the methods that a scoring run calls in this order, which other protocols replace.

    Args:
        dataset: the split; other files of it are opened when they are first needed.
    """

    title = "J&F: mean over all frames, then over expressions"
    """What the table of all expressions is called; it holds the mean J and F of this protocol."""
    is_ignoring = False
    """Whether pixels whose truth is unknown (``MaskStore.ignore``) are taken out of both masks first."""

    def __init__(self, dataset: DatasetConfig) -> None:
        self.dataset = dataset

    def observe(self, chunk: Chunk) -> Observed:
        """What is to be known of every chunk of frames besides J and F."""
        return {}

    def measure(self, measured: Measured) -> dict[str, float | None]:
        """Further measures of an expression by name; None where one does not exist."""
        return {}

    def match(self, video: Sequence[Measured]) -> list[ObjectScore]:
        """Scores of the objects of a video, from all its expressions."""
        return []

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """The benchmark's own tables, from everything that is counted (``missing=drop`` is applied before)."""
        return []


class MevisV2Protocol(JFProtocol):
    """N-acc, T-acc and Final."""

    title = "J&F: mean over all frames, then over all expressions, no-target ones included"

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """Final with J&F over all sentences, and with J&F over those that fit something."""
        overall = summarize(scores)
        accuracies = {"N-acc": overall.no_target_accuracy, "T-acc": overall.target_accuracy}
        rows: dict[str, dict[str, float]] = {}
        for name, chosen in (
            ("J&F with no-target expressions", list(scores)),
            ("J&F without no-target expressions", [score for score in scores if score.has_target]),
        ):
            jf = mean_jf(chosen)
            final = (jf["J&F"] + overall.no_target_accuracy + overall.target_accuracy) / 3
            rows[name] = {**jf, **accuracies, "Final": final, "num": len(chosen)}
        note = "Final = (J&F + N-acc + T-acc) / 3. Which J&F the challenge server takes is not published."
        return [ScoreTable("mevis_v2", "MeViS v2", rows, note)]


class LongRvosProtocol(JFProtocol):
    """tIoU and vIoU."""

    def measure(self, measured: Measured) -> dict[str, float | None]:
        """``tiou`` and ``viou``."""
        visible_T, answered_T = measured.visible_T, measured.answered_T
        both_T = visible_T & answered_T
        num_frames = int(np.count_nonzero(visible_T | answered_T))
        if num_frames == 0:
            return {"tiou": 1.0, "viou": 1.0}
        viou = float(measured.frames.j_T[both_T].sum() / num_frames)
        return {"tiou": int(np.count_nonzero(both_T)) / num_frames, "viou": viou}

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """A row per type of expression and one over all."""
        rows: dict[str, dict[str, float]] = {}
        for name, chosen in {**by_group(scores), "overall": list(scores)}.items():
            tiou, viou = (mean_of(score.measures[key] for score in chosen) for key in ("tiou", "viou"))
            rows[name] = {**mean_jf(chosen), "tIoU": tiou, "vIoU": viou, "num": len(chosen)}
        note = "overall: mean over all expressions, as the official script."
        return [ScoreTable("long_rvos", "Long-RVOS", rows, note)]


class ImageProtocol(JFProtocol):
    """cIoU and gIoU of pictures."""

    title = "J&F of each picture, then mean over expressions"
    is_ignoring = True

    def measure(self, measured: Measured) -> dict[str, float | None]:
        """``intersection`` and ``union`` in pixels and ``iou`` of one sentence about one picture."""
        frames = measured.frames
        intersection, union = int(frames.intersection_T.sum()), int(frames.union_T.sum())
        iou = 1.0 if union == 0 else intersection / (union + SMALL)
        return {"intersection": intersection, "union": union, "iou": 0.0 if measured.unusable_T.any() else iou}

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """A row per group, where there are groups, and one over all."""
        rows: dict[str, dict[str, float]] = {}
        for name, chosen in {**by_group(scores), "overall": list(scores)}.items():
            intersection, union = (
                sum(score.measures[key] or 0 for score in chosen) for key in ("intersection", "union")
            )
            ciou = intersection / (union + 1e-10) if chosen else math.nan
            rows[name] = {"cIoU": ciou, "gIoU": mean_of(score.measures["iou"] for score in chosen), "num": len(chosen)}
        return [ScoreTable("images", "cIoU and gIoU", rows)]
