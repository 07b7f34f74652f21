"""Does the model listen to the sentence? Its score beside those of answers that cannot have.

For every expression, J&F against its ground truth of

- ``model``: the prediction;
- ``both_look_alikes``: all objects that sentences of this kind name in the video, where they are look-alikes (Shapes);
- ``random_look_alike``: one of them drawn at random: chance, for whoever finds the look-alikes and no more;
- ``all_objects``: every annotated object of the video at once;
- ``random_object``: one object of the video drawn at random (the exact expectation, nothing is sampled);
- ``other_sentence``: the model's prediction for another sentence of the video about entirely different objects (the
  mean over all such sentences; where the dataset numbers no objects, equal masks are of one);
- ``empty``: nothing;
- ``ceiling``: the right mask in every frame that the model's frames and memory can decide (``glus/data/evidence.py``),
  in the others the better of the two look-alike rows: what no model of its kind exceeds;
- ``oracle``: the best, frame by frame, of the model's own answers to sentences of the video: its masks, were the
  choice always right.

Where an answer does not exist (no sentence about different objects; no object in the video) the expression is left out
of that row alone, and counted. As in the score, frames and pixels without a truth do not count; expressions without any
are left out, and counted, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from hashlib import sha256
from pathlib import Path

import numpy as np
from rich.console import Console

from glus.config import DatasetConfig
from glus.data.benchmarks.index import open_masks
from glus.data.evidence import decided_frames, read_evidence, variant_of
from glus.data.frames import FrameStore
from glus.data.masks import Size
from glus.data.parallel import map_in_processes
from glus.data.predictions import check_predictions_dir, open_predictions
from glus.evaluation.packed import BitMasks, TargetReader, compare, read_complete
from glus.evaluation.protocols import PROTOCOLS
from glus.evaluation.report import MEANS, csv_text, print_rows
from glus.evaluation.score import chunks, joined, read_scored_videos
from glus.types import Expression, Video

LOOK_ALIKES = ("both_look_alikes", "random_look_alike")
OBJECTS = ("all_objects", "random_object")
SENTENCE_BLIND = (*LOOK_ALIKES, *OBJECTS, "other_sentence")
"""The rows that ``model`` must beat to show that it uses the sentence."""
ROWS = ("model", *SENTENCE_BLIND, "empty", "ceiling", "oracle")
"""The answers that are compared; ``model`` comes first."""
_FOIL = "foil"
"""The answer beside the look-alike that is not meant."""
ABSENT = "absent"
"""The group whose expressions name no object (Shapes)."""
MEAN_OF_KINDS, MEAN_OF_PRESENT = "mean_over_kinds", "mean_over_kinds_but_absent"
_TITLES = {MEAN_OF_KINDS: MEANS[MEAN_OF_KINDS], MEAN_OF_PRESENT: f"{MEANS[MEAN_OF_KINDS]} but {ABSENT}"}
UNGROUPED = "all"
"""How the only group is called where a dataset has none."""

Scores = dict[str, float]
"""J&F in [0, 1] by row; a row that does not exist for the expression is left out."""
RowScores = dict[str, np.ndarray]
"""The same for each of some frames: (F,) float64 by row."""
Compared = tuple[Expression, Scores, np.ndarray | None, np.ndarray | None]
"""What ``Comparison`` holds of an expression."""


@dataclass(frozen=True)
class Judge:
    """J&F against the truth of one expression, in those of F frames that have one."""

    target: BitMasks
    """Of these."""
    void: BitMasks | None
    """Pixels of them that do not count, if any."""
    is_known_F: np.ndarray
    """(F,) bool: which these are."""

    def __call__(self, answer: BitMasks) -> np.ndarray:
        """float64 in [0, 1] for each of them, of an answer in all F."""
        words = answer.words_TWh if self.is_known_F.all() else answer.words_TWh[self.is_known_F]
        return compare(BitMasks(words, answer.height), self.target, self.void).jf_T


@dataclass(frozen=True)
class Comparison:
    """The rows of one model's predictions for every expression that has a ground truth, in dataset order."""

    expressions: tuple[Expression, ...]
    scores: tuple[Scores, ...]
    chosen: tuple[np.ndarray | None, ...]
    """(T,) bool, of the frames that have a truth: in which the answer fits the object better than the other look-alike,
    where there is one."""
    decided: tuple[np.ndarray | None, ...]
    """(T,) bool, of the same: which the model's frames and memory can decide, where that is known."""
    num_without_truth: int = field(default=0, kw_only=True)
    """Expressions that are left out."""

    def table(self) -> dict[str, dict[str, float | None]]:
        """J&F in percent by group and row, and ``margin``: how far ``model`` is above the best blind row of the group.

        Then ``MEAN_OF_KINDS`` (unweighted over the groups, also of their margins) and ``MEAN_OF_PRESENT`` (the same
        without the group ``absent``); None where no expression has the row, or not every group has its look-alikes.
        """
        table = {}
        for name, scores in self._groups().items():
            found = {row: [score[row] for score in scores if row in score] for row in ROWS}
            means = {row: 100 * float(np.mean(values)) if values else None for row, values in found.items()}
            table[name] = {**means, "margin": margin(means)}
        present = [rows for name, rows in table.items() if name != ABSENT]
        return {**table, MEAN_OF_KINDS: _over_groups(list(table.values())), MEAN_OF_PRESENT: _over_groups(present)}

    def excluded(self) -> dict[str, dict[str, int]]:
        """By group and row, how many expressions do not have the row; only counts above 0."""
        counts = {
            name: Counter(row for row in ROWS for score in scores if row not in score)
            for name, scores in self._groups().items()
        }
        return {name: dict(of_group) for name, of_group in counts.items() if of_group}

    def _groups(self) -> dict[str, list[Scores]]:
        groups: dict[str, list[Scores]] = {}
        for expression, scores in zip(self.expressions, self.scores, strict=True):
            groups.setdefault(expression.group or UNGROUPED, []).append(scores)
        reserved = {MEAN_OF_KINDS, MEAN_OF_PRESENT, "other_models"}.intersection(groups)
        if reserved:
            raise ValueError(f"a group of expressions is called {min(reserved)!r}, which the summary needs itself")
        return groups


def compare_predictions(
    dataset: DatasetConfig,
    predictions: Mapping[str, str | Path],
    num_workers: int = 1,
    max_videos: int | None = None,
    given_starts: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Comparison]:
    """Compare each model's predictions with the answers that ignore the sentence.

    Args:
        dataset: the split, with its ground truth.
        predictions: label of a model -> its folder of PNGs or run-length codes.
        num_workers: processes; results do not depend on it.
        max_videos: only the first so many videos of the split.
        given_starts: label -> ``Expression.name`` -> index of the frame that it starts from, of those whose start
            frames were given to them; the ceiling of other predictions with key frames is that of the best start.

    Returns:
        A comparison per label, in the given order.

    Raises:
        FileNotFoundError: a folder or a file of the dataset does not exist.
        ValueError: a prediction is missing or unusable, no predictions are given, or there is no ground truth.
        ChildProcessError: a process died.
    """
    if not predictions:
        raise ValueError("nothing to compare: expected predictions={label: folder}")
    for folder in predictions.values():
        check_predictions_dir(folder)
    videos = read_scored_videos(dataset)[:max_videos]
    folders = {label: Path(folder) for label, folder in predictions.items()}
    comparer = VideoComparer(dataset, folders, given_starts or {})
    results = list(map_in_processes(comparer, videos, num_workers))
    answers = {label: [answer for result in results for answer in result[label]] for label in predictions}
    num_all, num_compared = sum(map(len, videos)), min(map(len, answers.values()))
    if not num_compared:
        raise ValueError(f"{dataset.name}: none of the {num_all} expressions has a ground truth in any frame")
    left_out = num_all - num_compared
    return {
        label: Comparison(*zip(*found, strict=True), num_without_truth=left_out) for label, found in answers.items()
    }


class VideoComparer:
    """Compares one video at a time; opens the ground truth as ``VideoScorer`` does."""

    def __init__(
        self, dataset: DatasetConfig, predictions: dict[str, Path], given_starts: Mapping[str, Mapping[str, int]]
    ) -> None:
        self.predictions, self.given_starts = predictions, given_starts
        self.evidence = read_evidence(dataset)
        self.variants = {label: variant_of(folder) for label, folder in predictions.items()}
        self.masks, self.frames = open_masks(dataset), FrameStore(dataset)
        self.masks.open()
        self.is_ignoring = PROTOCOLS[dataset.protocol].is_ignoring

    def __call__(self, video: Video) -> dict[str, list[Compared]]:
        """By label, each expression that has a truth; every mask is read once."""
        opened = {label: open_predictions(folder, video) for label, folder in self.predictions.items()}
        annotated = {e: known_T for e in video if (known_T := self.masks.annotated(e)).any()}
        video = list(annotated)
        if not video:
            return {label: [] for label in opened}
        size, is_annotated_T = self.frames.size(video[0].video, video[0].frames[0]), np.any([*annotated.values()], 0)
        about, annotations = self._objects(video, size)
        is_alike = [(expression.video, expression.exp_id) in self.evidence for expression in video]
        alike = {number for own, has_twin in zip(about, is_alike, strict=True) for number in own if has_twin}
        found: dict[str, list[list[RowScores]]] = {label: [[] for _ in video] for label in opened}
        for span in chunks(len(video[0].frames)):
            frames = [frame for frame in span if is_annotated_T[frame]]
            targets, nothing = TargetReader(self.masks, frames, size), BitMasks.empty(len(frames), size)
            objects = {
                number: _where_known(targets, replace(video[0], annotation_ids=names))
                for number, names in annotations.items()
            }
            pair = {number: mask for number, mask in objects.items() if number in alike}
            judges = [self._judge(targets, e, known_T[frames]) for e, known_T in annotated.items()]
            blind = [
                {**_object_scores(objects.values(), nothing, judge, OBJECTS), "empty": judge(nothing)}
                | (_object_scores(pair.values(), nothing, judge, LOOK_ALIKES) if has_twin else {})
                for judge, has_twin in zip(judges, is_alike, strict=True)
            ]
            for label, predictions in opened.items():
                answers = [read_complete(predictions, expression, frames, size) for expression in video]
                for index, judge in enumerate(judges):
                    scores = _model_scores(about, answers, index, judge) | blind[index]
                    others = pair.keys() - about[index]
                    foils = [compare(answers[index], pair[number]).jf_T[judge.is_known_F] for number in others]
                    scores |= {_FOIL: np.max(foils, axis=0)} if is_alike[index] and foils else {}
                    found[label][index].append(scores)
        return {
            label: [
                self._over_frames(e, known_T, label, joined(scores))
                for (e, known_T), scores in zip(annotated.items(), of_video, strict=True)
            ]
            for label, of_video in found.items()
        }

    def _objects(self, video: Video, size: Size) -> tuple[list[set[str]], dict[str, tuple[str, ...]]]:
        """The objects of each sentence, and the annotations of each object.

        Several annotations are of one object where each sentence (Ref-YouTube-VOS valid, which numbers no objects) or
        each interval (GroundMoRe) has its own.
        """
        about: list[set[str]] = []
        annotations: dict[str, tuple[str, ...]] = {}
        for expression in video:
            names = expression.annotation_ids
            if expression.object_ids:
                numbers = [str(number) for number in expression.object_ids]
            else:
                numbers = [self._digest(replace(expression, annotation_ids=(name,)), size) for name in names]
            for number, name in zip(numbers, names, strict=True):
                annotations[number] = tuple(dict.fromkeys((*annotations.get(number, ()), name)))
            about.append(set(numbers))
        return about, annotations

    def _digest(self, expression: Expression, size: Size) -> str:
        """Of its masks."""
        known, digest = np.flatnonzero(self.masks.annotated(expression)), sha256()
        for span in chunks(len(known)):
            targets = TargetReader(self.masks, known[span].tolist(), size)
            digest.update(targets(expression).words_TWh.tobytes())
        return digest.hexdigest()

    def _judge(self, targets: TargetReader, expression: Expression, is_known_F: np.ndarray) -> Judge:
        known = [frame for frame, is_known in zip(targets.frames, is_known_F, strict=True) if is_known]
        void = targets.ignored(expression, known) if self.is_ignoring else None
        return Judge(targets(expression, known), void, is_known_F)

    def _over_frames(self, expression: Expression, known_T: np.ndarray, label: str, rows: RowScores) -> Compared:
        evidence, variant = self.evidence.get((expression.video, expression.exp_id)), self.variants[label]
        decided_T = None
        if evidence is not None and variant is not None:
            start = self.given_starts.get(label, {}).get(expression.name)
            decided_T = decided_frames(evidence, len(expression.frames), variant, start)[known_T]
            rows["ceiling"] = np.where(decided_T, 1.0, np.maximum(*(rows[row] for row in LOOK_ALIKES)))
        foil_T = rows.pop(_FOIL, None)
        chosen_T = None if foil_T is None else rows["model"] > foil_T
        return expression, {row: float(np.mean(jf_T)) for row, jf_T in rows.items()}, chosen_T, decided_T


def rows_as_csv(comparisons: Mapping[str, Comparison]) -> str:
    """Every expression's rows as CSV in [0, 1]; an empty cell where the expression does not have the row."""
    return csv_text(
        [
            {"model_label": label, "video": e.video, "exp_id": e.exp_id, "group": e.group, "text": e.text}
            | {row: scores.get(row) for row in ROWS}
            for label, comparison in comparisons.items()
            for e, scores in zip(comparison.expressions, comparison.scores, strict=True)
        ]
    )


def summary(comparisons: Mapping[str, Comparison]) -> dict[str, object]:
    """The first model's ``{kind: {row: percent}}`` and, if there are more, theirs under ``other_models``."""
    tables = {label: comparison.table() for label, comparison in comparisons.items()}
    first, *others = tables
    return {**tables[first], **({"other_models": {label: tables[label] for label in others}} if others else {})}


def print_comparison(label: str, comparison: Comparison, console: Console) -> None:
    """One line per kind with all rows in percent and the margin of ``model`` over the best sentence-blind row."""
    title = f"J&F of {label} and of answers that ignore the sentence, percent"
    cells = {
        _TITLES.get(kind, kind): {
            row.replace("_", " "): _decimals(value, "+" if row == "margin" else "") for row, value in rows.items()
        }
        for kind, rows in comparison.table().items()
    }
    print_rows(console, title, "kind", cells)
    for kind, rows_excluded in comparison.excluded().items():
        for row, count in rows_excluded.items():
            if row not in (*LOOK_ALIKES, "ceiling"):  # which few kinds have, as the table shows
                console.print(f"{kind}: {count} expressions have no {row} and are left out of that row", markup=False)
    if comparison.num_without_truth:
        console.print(f"{comparison.num_without_truth} expressions without ground truth, left out", markup=False)


def margin(rows: Mapping[str, float | None]) -> float | None:
    """Points by which ``model`` beats the best row that ignores the sentence; None if either does not exist."""
    blind = [value for row in SENTENCE_BLIND if (value := rows.get(row)) is not None]
    model = rows["model"]
    return None if model is None or not blind else model - max(blind)


def _model_scores(about: Sequence[set[str]], answers: Sequence[BitMasks], index: int, judge: Judge) -> RowScores:
    """Rows made of the model's answers: to this expression, to those about entirely different objects, to any."""
    scores = [judge(answer) for answer in answers]
    others = [
        score for objects, score in zip(about, scores, strict=True) if objects and objects.isdisjoint(about[index])
    ]
    rows = {"model": scores[index], "oracle": np.max(scores, axis=0)}
    return rows | ({"other_sentence": np.mean(others, axis=0)} if others else {})


def _object_scores(objects: Collection[BitMasks], nothing: BitMasks, judge: Judge, rows: tuple[str, str]) -> RowScores:
    """All of the objects at once, and where there are any, one of them at random."""
    union = reduce(np.bitwise_or, (mask.words_TWh for mask in objects), nothing.words_TWh)
    scores = {rows[0]: judge(BitMasks(union, nothing.height))}
    if objects:
        scores[rows[1]] = np.mean([judge(mask) for mask in objects], axis=0)
    return scores


def _where_known(targets: TargetReader, named: Expression) -> BitMasks:
    """The object that an expression names, in all the frames; nothing in those without its truth."""
    is_known_F = targets.masks.annotated(named)[targets.frames]
    if is_known_F.all():
        return targets(named)
    masks = BitMasks.empty(len(targets.frames), targets.size)
    masks.words_TWh[is_known_F] = targets(named, np.array(targets.frames)[is_known_F].tolist()).words_TWh
    return masks


def _over_groups(groups: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    rows: dict[str, float | None] = {}
    for row in (*ROWS, "margin"):
        found = [value for of_group in groups if (value := of_group[row]) is not None]
        is_whole = len(found) == len(groups) or row not in (*LOOK_ALIKES, "ceiling")
        rows[row] = float(np.mean(found)) if found and is_whole else None
    return rows


def _decimals(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f}"
