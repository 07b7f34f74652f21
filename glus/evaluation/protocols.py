"""What each benchmark reports beside J and F of every expression: one class a protocol, one row in ``PROTOCOLS``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from glus.config import DatasetConfig, Protocol
from glus.data.benchmarks.meta_expressions import REF_SAV_GROUPS, REVOS_GROUPS
from glus.data.masks import Size, runs_of
from glus.data.png_masks import PaletteMasks
from glus.evaluation.packed import BitMasks, JFScores, TargetReader, compare, region_counts
from glus.evaluation.report import ExpressionScore, Mean, ObjectScore, ScoreTable, by_group, mean_jf, mean_of, summarize
from glus.files import read_object
from glus.types import Expression, Video

Observed = dict[str, np.ndarray]
"""What a benchmark measures besides, by name; the first axis of each array is frames."""
FOREGROUND_FILE = "mask_dict_foreground.json"
"""ReVOS: the area of all annotated objects of each video, frame by frame."""
REVOS_MEAN_GROUPS = REVOS_GROUPS[:2]
"""Of which ReVOS takes the mean; the third has no object to be found."""
REVOS_MEASURES = {"A01": "a01", "R01": "r01", "legacy A255": "a255", "legacy R255": "r255"}
"""Columns of ReVOS' tables beside J and F, and the measure that each averages."""
ANNOTATORS = tuple(f"annotator {number}, {seen}" for number in (1, 2) for seen in ("first frame", "full video"))
"""Who wrote the sentences of Ref-DAVIS17."""
MAX_PROPOSALS = 20
"""Of one annotator of Ref-DAVIS17 about one video."""


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
        """A protocol that reads other files keeps their places."""

    def observe(self, video: Video, answers: Sequence[BitMasks], targets: TargetReader) -> Observed:
        """What is to be known of some frames of a video besides J and F.

        Args:
            video: its expressions.
            answers: F masks for each; empty where a frame could not be read.
            targets: the ground truth in these frames, of an expression, or of one that names other objects.
        """
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
    """MeViS v2: sentences that fit nothing, and how often an answer is rightly empty or rightly not.

    N-acc and T-acc are those of GRES (Liu et al., CVPR 2023) with a whole video in the place of an image, and
    Final = (J&F + N-acc + T-acc) / 3, which holds for the published rows of the LSVOS 2026 challenge. Nothing public
    says whether J&F is averaged over the sentences that fit nothing (where an empty answer has J = F = 1), so both are
    given.
    """

    title = "J&F: mean over all frames, then over all expressions, no-target ones included"

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """Final with J&F over all sentences, and with J&F over those that fit something."""
        overall = summarize(scores)
        fitting = [score for score in scores if score.has_target]
        rows: dict[str, dict[str, float]] = {}
        for word, chosen in (("with", scores), ("without", fitting)):
            row = {**mean_jf(chosen), "N-acc": overall.no_target_accuracy, "T-acc": overall.target_accuracy}
            final = (row["J&F"] + row["N-acc"] + row["T-acc"]) / 3
            rows[f"J&F {word} no-target expressions"] = {**row, "Final": final, "num": len(chosen)}
        note = "Final = (J&F + N-acc + T-acc) / 3. Which J&F the challenge server takes is not published."
        return [ScoreTable("mevis_v2", "MeViS v2", rows, note)]


class LongRvosProtocol(JFProtocol):
    """Long-RVOS: how well an answer is placed in time (iSEE-Laboratory/Long_RVOS, eval/eval_long_rvos).

    With G and P the sets of frames that have foreground in the ground truth and in the prediction:
    tIoU = |G & P| / |G | P|, vIoU = (sum of J over G & P) / |G | P|; both are 1 where both sets are empty.
    """

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
        groups = {**by_group(scores), "overall": list(scores)}
        rows = {name: _row(chosen, {"tIoU": "tiou", "vIoU": "viou"}) for name, chosen in groups.items()}
        note = "overall: mean over all expressions, as the official script."
        return [ScoreTable("long_rvos", "Long-RVOS", rows, note)]


class ImageProtocol(JFProtocol):
    """Pictures (RefCOCO, RefCOCO+, RefCOCOg, ReasonSeg) as dvlab-research/LISA scores them (train_ds.py, ``validate``).

    cIoU is the sum of all intersections over the sum of all unions, gIoU the mean over sentences of I / (U + 1e-5),
    which is 1 where the union is empty. The area to be ignored (ReasonSeg) counts nowhere. LISA sums in float32 on the
    GPU, we in float64.

    LISA adds up the polygons of an object, and its histogram drops pixels of more than 1, so that where polygons
    overlap an answer is wrong; here they are of the object. LISA takes a file without outlines for a picture without
    the object, which an empty answer gets right; here it is in no mean.
    """

    title = "J&F of each picture, then mean over expressions"
    is_ignoring = True

    def measure(self, measured: Measured) -> dict[str, float | None]:
        """``intersection`` and ``union`` in pixels and ``iou`` of one sentence about one picture."""
        frames = measured.frames
        intersection, union = int(frames.intersection_T.sum()), int(frames.union_T.sum())
        iou = 1.0 if union == 0 else intersection / (union + 1e-5)
        return {"intersection": intersection, "union": union, "iou": 0.0 if measured.unusable_T.any() else iou}

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """A row per group, where there are groups, and one over all."""
        rows: dict[str, dict[str, float]] = {}
        for name, chosen in {**by_group(scores), "overall": list(scores)}.items():
            intersection, union = (sum(one.measures[key] or 0 for one in chosen) for key in ("intersection", "union"))
            ciou = intersection / (union + 1e-10) if chosen else math.nan
            rows[name] = {"cIoU": ciou, "gIoU": mean_of(one.measures["iou"] for one in chosen), "num": len(chosen)}
        note = (
            "Unlike in LISA's script, pixels where polygons of an object overlap belong to it, and pictures without "
            "outlines are left out."
        )
        return [ScoreTable("images", "cIoU and gIoU", rows, note)]


class RevosProtocol(JFProtocol):
    """ReVOS: J, F, pixel accuracy A and robustness R of referring and of reasoning expressions.

    Source: cilinyan/VISA, tools/eval_revos.py and tools/metrics.py. For each frame, with prediction P, ground truth G
    and foreground S (all annotated objects of the video): A = share of pixels where P equals G, R = max(1 - |P without
    G| / (|S| + 1e-6), 0). The script rounds each expression's percent to two decimals before it averages; "overall" is
    the mean of the two groups; expressions about things that do not exist are in no mean.

    The script compares pixel *values*: with masks of 0/255, which the authors write, A counts every foreground pixel as
    wrong, and R weighs each false pixel 255 times (and wraps around in 8 bits where objects overlap). Published A and R
    are of that kind or of 0/1 masks, depending on who wrote them. A01 and R01 are what the formulas mean; A255 and R255
    are the script's values for 0/255 masks, for comparison with papers only.
    """

    title = "J&F: mean over all frames, then over all expressions (not what ReVOS reports, see below)"

    def __init__(self, dataset: DatasetConfig) -> None:
        self._path = Path(dataset.root) / FOREGROUND_FILE
        if not self._path.is_file():
            raise FileNotFoundError(
                f"no file {self._path}; the robustness score of ReVOS needs it (it comes with the masks)"
            )

    def observe(self, video: Video, answers: Sequence[BitMasks], targets: TargetReader) -> Observed:
        """``foreground``, (F,) int64 pixels, and ``overlap``, (F, E) int64: the pixels that each expression's
        prediction shares with each of its objects, summed over the objects."""
        name, frames = video[0].video, video[0].frames
        codes = self._codes(name, len(frames))
        areas = [self._area(codes[frame], targets.size, f"{name}, frame {frames[frame]}") for frame in targets.frames]
        overlaps = [_overlap(expression, answer, targets) for expression, answer in zip(video, answers, strict=True)]
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
        official, exact = (
            _two_groups(scores, REVOS_MEAN_GROUPS, REVOS_MEASURES, mean) for mean in (_rounded_mean, mean_of)
        )
        return [
            ScoreTable("revos", "ReVOS (official: percents of expressions rounded first)", official, note),
            ScoreTable("revos_unrounded", "ReVOS, not rounded", exact),
        ]

    @cached_property
    def _foreground(self) -> dict[str, Any]:
        return read_object(self._path)

    def _codes(self, video: str, num_frames: int) -> list[Any]:
        entry = self._foreground.get(video)
        codes = entry.get("masks_rle") if isinstance(entry, dict) else None
        if not isinstance(codes, list) or len(codes) != num_frames:
            found = f"{len(codes)} masks" if isinstance(codes, list) else "none"
            raise ValueError(
                f"{self._path}: expected masks_rle of {num_frames} frames for video {video!r}, found {found}"
            )
        return codes

    def _area(self, code: Any, size: Size, place: str) -> int:
        """Pixels of one code, or the sum over a list of them (the script adds those up)."""
        if isinstance(code, list):
            return sum(self._area(part, size, place) for part in code)
        return int(runs_of(code, size, f"{self._path}, {place}")[1::2].sum())


def _overlap(expression: Expression, answer: BitMasks, targets: TargetReader) -> np.ndarray:
    objects = [replace(expression, annotation_ids=(name,)) for name in expression.annotation_ids]
    shared = [region_counts(answer, targets(one))[0] for one in objects]
    return np.array(shared, np.int64).reshape(-1, len(targets.frames)).sum(axis=0)


def _row(scores: Sequence[ExpressionScore], measures: Mapping[str, str], mean: Mean = mean_of) -> dict[str, float]:
    """The means of J, F and further measures (by column)."""
    others = {column: mean(score.measures[name] for score in scores) for column, name in measures.items()}
    return {**mean_jf(scores, mean), **others, "num": len(scores)}


def _two_groups(
    scores: Sequence[ExpressionScore], groups: Sequence[str], measures: Mapping[str, str], mean: Mean
) -> dict[str, dict[str, float]]:
    """A row for each of two groups, and their mean."""
    rows = {group: _row([score for score in scores if score.group == group], measures, mean) for group in groups}
    first, second = rows.values()
    overall = {column: (first[column] + second[column]) / 2 for column in first}
    return {**rows, "overall": {**overall, "num": int(first["num"] + second["num"])}}


def _rounded_mean(values: Iterable[float | None]) -> float:
    """Of percents with two decimals, as shares of 1."""
    return mean_of(None if value is None else float(np.round(100 * value, 2)) / 100 for value in values)


class RefSavProtocol(JFProtocol):
    """Ref-SAV: J, F and pixel accuracy A of long and of short descriptions, and the mean of the two groups.

    Source: bytedance/Sa2VA, tools/eval/eval_ref_sav.py, which is ReVOS' script without its robustness: each
    expression's percent is rounded to two decimals before it is averaged. Its masks are 0 and 1, so A is the share of
    pixels that are right (where objects of a sentence overlap, the script takes both for wrong).
    """

    title = "J&F: mean over all frames, then over all expressions (not what Ref-SAV reports, see below)"

    def measure(self, measured: Measured) -> dict[str, float | None]:
        """``accuracy`` of one expression."""
        frames, num_pixels = measured.frames, measured.size[0] * measured.size[1]
        right_T = (num_pixels - frames.union_T + frames.intersection_T) / num_pixels
        return {"accuracy": float(np.mean(np.where(measured.unusable_T, 0.0, right_T)))}

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """The script's own numbers."""
        rows = _two_groups(scores, REF_SAV_GROUPS, {"A": "accuracy"}, _rounded_mean)
        return [ScoreTable("ref_sav", "Ref-SAV (percents of expressions rounded first)", rows)]


class RefDavis17Protocol(JFProtocol):
    """Ref-DAVIS17, which has two protocols whose numbers must not be compared.

    **A** (ReferFormer, VideoLISA, OnlineRefer, MUTR: the usual one). For each of the four annotators, the masks of a
    video's K sentences are merged into one picture of object ids, in which a pixel belongs to one object; ours are
    binary, so the lowest id wins (as VideoLISA's). They are scored by the unsupervised task of davis2017-evaluation:
    all frames; void pixels (255) count nowhere; proposals are assigned to objects so that the sum of mean (J + F) / 2
    is largest (swapped identities are forgiven); mean over the objects of all videos, then over the annotators. The
    number of objects is the largest id in the first frame, that of proposals the largest predicted id, at most 20.

    **B** (VISA, GLUS, Sa2VA). Each sentence alone against its object: no merging, no assignment, void is background;
    mean over the sentences. This is the table of all expressions.

    An expression's id is 4 * (object id - 1) + annotator (ReferFormer, tools/data/convert_davis_to_ytvos.py). A frame
    of a sentence whose prediction cannot be read is empty in the merged picture, and its object scores 0 there.
    """

    title = "Ref-DAVIS17, protocol B (VISA, GLUS: each expression alone): mean over all frames, then over expressions"

    def observe(self, video: Video, answers: Sequence[BitMasks], targets: TargetReader) -> Observed:
        """``jf_a``, (F, 2, P, G) float64: J and F of annotator a's merged proposals against the objects, from id 1 on;
        ``seen_a``, (F, P) bool: whether a proposal has a pixel."""
        first = video[0]
        assert isinstance(targets.masks, PaletteMasks)
        num_objects = targets.masks.num_objects(first, targets.size)
        if num_objects == 0:
            raise ValueError(
                f"{first.name}: the ground truth of the first frame has no object; protocol A expects some"
            )
        objects = [targets(replace(first, annotation_ids=(str(i + 1),))) for i in range(num_objects)]
        void = targets.ignored(first, targets.frames)
        num_proposals = max(num_objects, *(expression.object_ids[0] for expression in video))
        observed = {}
        for number in range(len(ANNOTATORS)):
            proposals = _merge(_answers_of(number, video, answers), num_proposals)
            observed[f"seen_{number}"] = np.stack([mask.words_TWh.any(axis=(1, 2)) for mask in proposals], axis=1)
            scores = [[compare(proposal, target, void) for target in objects] for proposal in proposals]
            jf_2PGF = np.array([[[getattr(cell, key) for cell in row] for row in scores] for key in ("j_T", "f_T")])
            observed[f"jf_{number}"] = np.moveaxis(jf_2PGF, -1, 0)
        return observed

    def match(self, video: Sequence[Measured]) -> list[ObjectScore]:
        """The objects of one video, once for each annotator who wrote about it."""
        return [score for number in range(len(ANNOTATORS)) for score in _match(video, number)]

    def tables(self, scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
        """A row for each annotator, and their mean."""
        of = {name: [score for score in objects if score.group == name] for name in ANNOTATORS}
        rows: dict[str, dict[str, float]] = {name: {**mean_jf(own), "objects": len(own)} for name, own in of.items()}
        mean = {column: float(np.mean([row[column] for row in rows.values()])) for column in ("J", "F", "J&F")}
        rows["mean of the four annotators"] = {**mean, "objects": len(objects)}
        title = "Ref-DAVIS17, protocol A (ReferFormer: merged, assigned, without void)"
        note = "Not comparable with protocol B (all expressions, above), which VISA, GLUS and Sa2VA report."
        return [ScoreTable("protocol_a", title, rows, note)]


def annotator(expression: Expression) -> int:
    """0 to 3: which of ``ANNOTATORS`` wrote the sentence of Ref-DAVIS17.

    Raises:
        ValueError: its id is not the one that its object and an annotator give.
    """
    is_number = expression.exp_id.isdecimal() and len(expression.object_ids) == 1
    if not is_number or int(expression.exp_id) // len(ANNOTATORS) != expression.object_ids[0] - 1:
        raise ValueError(
            f"{expression.name} about object {list(expression.object_ids)}: expected one object, and the exp_id "
            "4 * (object - 1) + annotator, as tools/convert_davis17.py gives it"
        )
    return int(expression.exp_id) % len(ANNOTATORS)


def _answers_of(number: int, video: Video, answers: Sequence[BitMasks]) -> dict[int, BitMasks]:
    """The masks of one annotator's sentences by object id."""
    own = {e.object_ids[0]: answer for e, answer in zip(video, answers, strict=True) if annotator(e) == number}
    if not own:
        raise ValueError(f"{video[0].name}: no sentence of {ANNOTATORS[number]} about this video")
    return own


def _merge(answers: dict[int, BitMasks], num_proposals: int) -> list[BitMasks]:
    """One mask per object id from 1 on, in which no pixel has two: the lowest id wins; empty for ids without answer."""
    shape = next(iter(answers.values()))
    taken = np.zeros_like(shape.words_TWh)
    merged = []
    for number in range(1, num_proposals + 1):
        words_TWh = answers[number].words_TWh & ~taken if number in answers else np.zeros_like(taken)
        taken |= words_TWh
        merged.append(BitMasks(words_TWh, shape.height))
    return merged


def _match(video: Sequence[Measured], number: int) -> list[ObjectScore]:
    """The objects of one video, each with the proposal of one annotator that is assigned to it."""
    first = video[0]
    jf_T2PG, seen_TP = first.observed[f"jf_{number}"].copy(), first.observed[f"seen_{number}"]
    own = [measured for measured in video if annotator(measured.expression) == number]
    for measured in own:
        jf_T2PG[measured.unusable_T, :, measured.expression.object_ids[0] - 1] = 0
    is_complete = not any(measured.unusable_T.any() for measured in own)
    num_predicted = int(np.flatnonzero(seen_TP.any(axis=0)).max(initial=-1)) + 1
    if num_predicted > MAX_PROPOSALS:
        raise ValueError(f"{first.expression.name}: {num_predicted} proposals; expected at most {MAX_PROPOSALS}")
    # The proposals that the evaluator would see, padded to as many as objects; frames last, as its sums go.
    kept_T2PG = jf_T2PG[:, :, : max(num_predicted, jf_T2PG.shape[3])]
    mean_2PG = np.mean(np.ascontiguousarray(np.moveaxis(kept_T2PG, 0, -1)), axis=-1)
    rows, columns = linear_sum_assignment(-(mean_2PG[0] + mean_2PG[1]) / 2)
    matched = zip(rows.tolist(), columns.tolist(), mean_2PG[:, rows, columns].T.tolist(), strict=True)
    return [
        ObjectScore(first.expression.video, ANNOTATORS[number], column + 1, row + 1, j, f, is_complete)
        for row, column, (j, f) in matched
    ]


PROTOCOLS: dict[Protocol, type[JFProtocol]] = {
    Protocol.jf: JFProtocol,
    Protocol.mevis_v2: MevisV2Protocol,
    Protocol.revos: RevosProtocol,
    Protocol.ref_davis17: RefDavis17Protocol,
    Protocol.long_rvos: LongRvosProtocol,
    Protocol.ref_sav: RefSavProtocol,
    Protocol.images: ImageProtocol,
}
"""By the name that ``dataset.protocol`` gives."""
