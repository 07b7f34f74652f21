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

from glus.config import DatasetConfig
from glus.data.mask_store import PaletteMasks
from glus.evaluation.measured import Chunk, Measured, Observed
from glus.evaluation.packed import BitMasks, score_frames
from glus.evaluation.protocols.rules import Observe, Rules
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, mean_of
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


def open_observer(_: DatasetConfig) -> Observe:
    """Nothing is needed beside the ground truth."""
    return observe


def observe(chunk: Chunk) -> Observed:
    """``jf_a``, (F, 2, P, G) float64: J and F of annotator a's merged proposals against the objects, from id 1 on;
    ``seen_a``, (F, P) bool: whether a proposal has a pixel."""
    first = chunk.expressions[0]
    assert isinstance(chunk.masks, PaletteMasks)
    num_objects = chunk.masks.num_objects(first, chunk.size)
    if num_objects == 0:
        raise ValueError(f"{first.name}: the ground truth of the first frame has no object; protocol A expects some")
    objects = [chunk.target(replace(first, annotation_ids=(str(i + 1),))) for i in range(num_objects)]
    void = BitMasks.from_dense(chunk.masks.ignore(first, chunk.frames, chunk.size))
    num_proposals = max(max(expression.object_ids[0] for expression in chunk.expressions), num_objects)
    observed = {}
    for number in range(len(ANNOTATORS)):
        proposals = merge(_answers(chunk, number), num_proposals)
        observed[f"seen_{number}"] = np.stack([mask.words_TWh.any(axis=(1, 2)) for mask in proposals], axis=1)
        scores = [[score_frames(proposal, target, void) for target in objects] for proposal in proposals]
        jf_2PGF = np.array([[[getattr(cell, key) for cell in row] for row in scores] for key in ("j_T", "f_T")])
        observed[f"jf_{number}"] = np.moveaxis(jf_2PGF, -1, 0)
    return observed


def merge(answers: dict[int, BitMasks], num_proposals: int) -> list[BitMasks]:
    """One mask per object id from 1 on, in which no pixel has two: the lowest id wins; empty for ids without answer."""
    shape = next(iter(answers.values()))
    taken = np.zeros_like(shape.words_TWh)
    merged = []
    for number in range(1, num_proposals + 1):
        words_TWh = answers[number].words_TWh & ~taken if number in answers else np.zeros_like(taken)
        taken |= words_TWh
        merged.append(BitMasks(words_TWh, shape.height))
    return merged


def match(video: Sequence[Measured]) -> list[ObjectScore]:
    """The objects of one video, once for each annotator who wrote about it."""
    scores = []
    for number in range(len(ANNOTATORS)):
        own = {m.expression.object_ids[0]: m for m in video if annotator(m.expression) == number}
        observed = video[0].observed
        jf_T2PG, seen_TP = observed[f"jf_{number}"].copy(), observed[f"seen_{number}"]
        for object_id, measured in own.items():
            jf_T2PG[measured.unusable_T, :, object_id - 1] = 0
        is_complete = not any(measured.unusable_T.any() for measured in own.values())
        num_predicted = int(np.flatnonzero(seen_TP.any(axis=0)).max(initial=-1)) + 1
        if num_predicted > MAX_PROPOSALS:
            raise ValueError(f"{video[0].expression.name}: {num_predicted} proposals; expected at most {MAX_PROPOSALS}")
        mean_2PG = _assignable(jf_T2PG, num_predicted)
        rows, columns = linear_sum_assignment(-(mean_2PG[0] + mean_2PG[1]) / 2)
        for row, column in zip(rows, columns, strict=True):
            j, f = (float(value) for value in mean_2PG[:, row, column])
            name = video[0].expression.video
            scores.append(ObjectScore(name, ANNOTATORS[number], int(column) + 1, int(row) + 1, j, f, is_complete))
    return scores


def tables(scores: Sequence[ExpressionScore], objects: Sequence[ObjectScore]) -> list[ScoreTable]:
    """Protocol A: a row for each annotator, and their mean."""
    rows = {}
    for name in ANNOTATORS:
        own = [score for score in objects if score.group == name]
        j, f = mean_of(score.j for score in own), mean_of(score.f for score in own)
        rows[name] = {"J": j, "F": f, "J&F": (j + f) / 2, "objects": len(own)}
    columns = ("J", "F", "J&F")
    mean = {column: float(np.mean([row[column] for row in rows.values()])) for column in columns}
    rows["mean of the four annotators"] = {**mean, "objects": sum(int(row["objects"]) for row in rows.values())}
    note = "Not comparable with protocol B (all expressions, above), which VISA, GLUS and Sa2VA report."
    return [
        ScoreTable("protocol_a", "Ref-DAVIS17, protocol A (ReferFormer: merged, assigned, without void)", rows, note)
    ]


def _assignable(jf_T2PG: np.ndarray, num_predicted: int) -> np.ndarray:
    """(2, P', G): means over frames of the proposals that the evaluator would see, padded to as many as objects."""
    num_proposals = max(num_predicted, jf_T2PG.shape[3])
    jf_2PGT = np.ascontiguousarray(np.moveaxis(jf_T2PG[:, :, :num_proposals], 0, -1))
    return np.mean(jf_2PGT, axis=-1)


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


RULES = Rules(
    "Ref-DAVIS17, protocol B (VISA, GLUS: each expression alone): mean over all frames, then over expressions",
    open_observer=open_observer,
    match=match,
    tables=tables,
)
