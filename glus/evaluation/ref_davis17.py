"""Ref-DAVIS17, which has two protocols whose numbers must not be compared.

**A** (ReferFormer, VideoLISA, OnlineRefer, MUTR: the usual one). For each of the four annotators, the masks of a
video's K sentences are merged into one picture of object ids, in which a pixel belongs to one object; ours are binary,
so the lowest id wins (as VideoLISA's). They are scored by the unsupervised task of davis2017-evaluation: all frames;
void pixels (255) count nowhere; proposals are assigned to objects so that the sum of mean (J + F) / 2 is largest
(swapped identities are forgiven); mean over the objects of all videos, then over the annotators. The number of objects
is the largest id in the first frame, that of proposals the largest predicted id, at most 20.

**B** (VISA, GLUS, Sa2VA). Each sentence alone against its object: no merging, no assignment, void is background; mean
over the sentences. This is the table of all expressions.

An expression's id is 4 * (object id - 1) + annotator (ReferFormer, tools/data/convert_davis_to_ytvos.py). A frame of a
sentence whose prediction cannot be read is empty in the merged picture, and its object scores 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from glus.data.png_masks import PaletteMasks
from glus.evaluation.packed import BitMasks, compare
from glus.evaluation.protocols import Chunk, JFProtocol, Measured, Observed
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, mean_jf
from glus.types import Expression

ANNOTATORS = (
    "annotator 1, first frame",
    "annotator 1, full video",
    "annotator 2, first frame",
    "annotator 2, full video",
)
MAX_PROPOSALS = 20


def annotator(expression: Expression) -> int:
    """0 to 3: which of ``ANNOTATORS`` wrote the sentence.

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


class RefDavis17Protocol(JFProtocol):
    """Protocol A in a table of its own, beside protocol B."""

    title = "Ref-DAVIS17, protocol B (VISA, GLUS: each expression alone): mean over all frames, then over expressions"

    def observe(self, chunk: Chunk) -> Observed:
        """``jf_a``, (F, 2, P, G) float64: J and F of annotator a's merged proposals against the objects, from id 1 on;
        ``seen_a``, (F, P) bool: whether a proposal has a pixel."""
        first = chunk.expressions[0]
        assert isinstance(chunk.masks, PaletteMasks)
        num_objects = chunk.masks.num_objects(first, chunk.size)
        if num_objects == 0:
            raise ValueError(
                f"{first.name}: the ground truth of the first frame has no object; protocol A expects some"
            )
        objects = [chunk.target(replace(first, annotation_ids=(str(i + 1),))) for i in range(num_objects)]
        void = BitMasks.from_dense(chunk.masks.ignore(first, chunk.frames, chunk.size))
        num_proposals = max(num_objects, *(expression.object_ids[0] for expression in chunk.expressions))
        observed = {}
        for number in range(len(ANNOTATORS)):
            proposals = _merge(_answers(chunk, number), num_proposals)
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
        rows: dict[str, dict[str, float]] = {}
        for name in ANNOTATORS:
            own = [score for score in objects if score.group == name]
            rows[name] = {**mean_jf(own), "objects": len(own)}
        mean: dict[str, float] = {
            column: float(np.mean([row[column] for row in rows.values()])) for column in ("J", "F", "J&F")
        }
        rows["mean of the four annotators"] = {**mean, "objects": len(objects)}
        title = "Ref-DAVIS17, protocol A (ReferFormer: merged, assigned, without void)"
        note = "Not comparable with protocol B (all expressions, above), which VISA, GLUS and Sa2VA report."
        return [ScoreTable("protocol_a", title, rows, note)]


def _answers(chunk: Chunk, number: int) -> dict[int, BitMasks]:
    """The masks of one annotator's sentences by object id."""
    answers = {
        expression.object_ids[0]: masks
        for expression, masks in zip(chunk.expressions, chunk.predictions, strict=True)
        if annotator(expression) == number
    }
    if not answers:
        raise ValueError(f"{chunk.expressions[0].name}: no sentence of {ANNOTATORS[number]} about this video")
    return answers


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
