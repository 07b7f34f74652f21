"""Score a folder of predictions: exactly the expressions of the split, each prediction accounted for.

Predictions are PNGs or run-length codes (see ``predictions.py``) at the size of the video's frames. Work is shared by
videos among processes, and every mean is taken in dataset order, so scores do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from glus.config import DatasetConfig, Missing
from glus.console import bar
from glus.data.benchmarks.index import by_video, open_masks, read_expressions, require_annotations
from glus.data.frames import FrameStore
from glus.data.masks import frame_name
from glus.data.parallel import map_in_processes
from glus.data.predictions import (
    Doubt,
    VideoPredictions,
    check_predictions_dir,
    count_doubts,
    open_predictions,
    read_answers,
    unexpected_files,
)
from glus.evaluation.packed import JFScores, TargetReader, compare, read_packed
from glus.evaluation.protocols import PROTOCOLS, Measured, Observed
from glus.evaluation.report import Answer, ExpressionScore, ObjectScore, ScoreReport, ScoreTable, mean_of, no_nan
from glus.files import read_object
from glus.types import Expression, Video

CHUNK_FRAMES = 32
"""Frames in memory at a time, so that memory does not grow with the video."""


@dataclass(frozen=True)
class VideoScore:
    """All that is known of one video."""

    expressions: list[ExpressionScore]
    objects: list[ObjectScore]
    problems: tuple[str, ...]
    """What is wrong with the file of predictions as such."""
    warnings: tuple[str, ...]
    doubts: dict[str, Doubt]
    """By file, or by expression and frame."""
    without_truth: list[str]
    """Expressions that cannot be scored, which is no fault of the predictions."""
    num_unscored: int
    """Frames of all expressions for which there is no ground truth."""
    unscorable: tuple[str, ...] = ()
    """Why the dataset's own files allow no score of this video, or of some of its sentences."""
    undecided: tuple[Undecided, ...] = ()
    """Of each expression, where it is asked for."""


def score_predictions(
    dataset: DatasetConfig,
    predictions_dir: str | Path,
    missing: Missing = Missing.zero,
    num_workers: int = 1,
    max_videos: int | None = None,
    existence_threshold: float | None = None,
) -> ScoreReport:
    """J and F of every expression of a split, their means per group and overall, and the benchmark's own tables.

    Args:
        dataset: the split, with its ground truth.
        predictions_dir: folder of PNGs or run-length codes, see ``predictions.py``.
        missing: what a missing or unusable mask does. ``zero``: its frame scores 0, by every measure; ``drop``: its
            expression is left out of the means; ``error``: ValueError. The first two list it in the report.
        num_workers: scoring processes; 1 scores in this process. Scores do not depend on it.
        max_videos: only the first so many videos of the split.
        existence_threshold: also say what this threshold would change; the predictions must be complete.

    Raises:
        FileNotFoundError: the folder of predictions or a file of the dataset does not exist, or with
            ``existence_threshold`` one of the predictions.
        ValueError: ``missing`` is ``error`` and a prediction is missing or unusable; a video is predicted in both
            forms; the split has no ground truth.
        OSError: the masks cannot be packed anywhere (see ``MaskPack``), or a scoring process died.
    """
    folder = Path(predictions_dir)
    check_predictions_dir(folder)
    all_videos = read_scored_videos(dataset)
    scorer = VideoScorer(dataset, folder, missing, existence_threshold is not None)
    chosen = all_videos[:max_videos]
    videos = list(bar(map_in_processes(scorer, chosen, num_workers), len(chosen), "scoring"))
    scores = [score for video in videos for score in video.expressions]
    objects = [score for video in videos for score in video.objects]
    counted = [score for score in scores if score.is_counted]
    complete = [score for score in objects if score.is_complete or missing is not Missing.drop]
    tables = scorer.protocol.tables(counted, complete)
    undecided = [one for video in videos for one in video.undecided]
    if existence_threshold is not None and undecided:
        tables.append(existence_table(Thresholds(undecided), existence_threshold))
    return ScoreReport(
        dataset=dataset.name,
        split=dataset.split,
        predictions=str(predictions_dir),
        missing=missing.value,
        official_missing=dataset.official_missing,
        protocol=scorer.protocol.title,
        num_videos=len(chosen),
        num_videos_of_split=len(all_videos),
        expressions=tuple(scores),
        objects=tuple(objects),
        tables=tuple(tables),
        file_problems=tuple(problem for video in videos for problem in video.problems),
        num_unscored=sum(video.num_unscored for video in videos),
        without_truth=tuple(line for video in videos for line in video.without_truth),
        warnings=(*(line for video in videos for line in video.warnings), *unexpected_files(folder, all_videos)),
        doubts=tuple(count_doubts({name: doubt for video in videos for name, doubt in video.doubts.items()})),
        unscorable=tuple(line for video in videos for line in video.unscorable),
    )


def read_scored_videos(dataset: DatasetConfig) -> list[Video]:
    """``by_video`` of a split with ground truth.

    Raises:
        FileNotFoundError: the expression file does not exist.
        ValueError: the file is not as expected, or the split has no public ground truth.
    """
    expressions = read_expressions(dataset)
    require_annotations(dataset, expressions)
    return by_video(expressions)


def chunks(num_frames: int) -> Iterator[range]:
    """The frames of a video, as many at a time as may be in memory."""
    for start in range(0, num_frames, CHUNK_FRAMES):
        yield range(start, min(start + CHUNK_FRAMES, num_frames))


class VideoScorer:
    """Scores the expressions of one video at a time; opens the ground truth of the split, before it may be sent to
    other processes, so that only one packs it."""

    def __init__(
        self, dataset: DatasetConfig, predictions_dir: Path, missing: Missing, is_deciding: bool = False
    ) -> None:
        if is_deciding:
            check_undecided(predictions_dir)
        self.predictions_dir, self.missing, self.is_deciding = predictions_dir, missing, is_deciding
        self.masks, self.frames = open_masks(dataset), FrameStore(dataset)
        self.masks.open()
        self.protocol = PROTOCOLS[dataset.protocol](dataset)

    def __call__(self, video: Video) -> VideoScore:
        """The scores of these expressions, in their order.

        Raises:
            ValueError: a prediction is missing or unusable and ``missing`` is ``error``.
        """
        return self._score_video(video, open_predictions(self.predictions_dir, video))

    def _score_video(self, video: Video, predictions: VideoPredictions) -> VideoScore:
        """If need be without the sentences whose own truth cannot be read."""
        try:
            scored = {expression: np.flatnonzero(self.masks.annotated(expression)) for expression in video}
            measured = self._measure({e: frames for e, frames in scored.items() if frames.size}, predictions)
        except (ValueError, FileNotFoundError) as error:  # of a frame or of the truth; the other videos can be scored
            damaged = {expression: why for expression in video if (why := self._why_unreadable(expression))}
            if not 0 < len(damaged) < len(video):
                return VideoScore([], [], (), (), {}, [], 0, (f"{video[0].dataset}/{video[0].video}: {error}",))
            rest = self._score_video([expression for expression in video if expression not in damaged], predictions)
            lines = (f"{expression.name}: {why}" for expression, why in damaged.items())
            return replace(rest, unscorable=(*lines, *rest.unscorable))
        problems = [*predictions.problems, *(line for one in measured for line in one.problems)]
        if problems and self.missing is Missing.error:
            raise ValueError(f"{problems[0]} (missing=error stops at the first)")
        return VideoScore(
            [self._score(one, predictions) for one in measured],
            self.protocol.match(measured),
            predictions.problems,
            predictions.warnings,
            predictions.doubts | _full_masks(measured, scored),
            [f"{expression.name}: no frame has a ground truth" for expression, of in scored.items() if not of.size],
            sum(len(expression.frames) - frames.size for expression, frames in scored.items()),
            undecided=tuple(self._undecided(one, scored) for one in measured) if self.is_deciding else (),
        )

    def _why_unreadable(self, expression: Expression) -> str:
        """What is wrong with the truth of this sentence; "" if nothing is."""
        try:
            size = self.frames.size(expression.video, expression.frames[0])
            for frame in np.flatnonzero(self.masks.annotated(expression)).tolist():
                self.masks.parts(expression, [frame], size)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return ""

    def _undecided(self, measured: Measured, scored: Mapping[Expression, np.ndarray]) -> Undecided:
        """Raises FileNotFoundError or ValueError where the predictions do not say what exists."""
        expression, frames = measured.expression, measured.frames
        existence_T = read_existence(self.predictions_dir, expression)[scored[expression]]
        # J = F = 0, but for F against an object that fills the frame: neither has a boundary then.
        is_full_T = frames.target_T == measured.size[0] * measured.size[1]
        emptied_T = np.select([frames.target_T == 0, is_full_T], [1.0, 0.5])
        return Undecided(bool(expression.annotation_ids), existence_T, frames.jf_T, emptied_T, frames.prediction_T > 0)

    def _measure(self, scored: dict[Expression, np.ndarray], predictions: VideoPredictions) -> list[Measured]:
        """What is counted of each expression in the frames that are scored."""
        video = list(scored)
        if not video:
            return []
        size = self.frames.size(video[0].video, video[0].frames[0])
        scores: list[list[JFScores]] = [[] for _ in video]
        unusable: list[dict[int, str]] = [{} for _ in video]
        observed: list[Observed] = []
        for span in chunks(max(len(expression.frames) for expression in video)):
            targets = TargetReader(self.masks, span, size)
            answers = []
            for index, (expression, frames) in enumerate(scored.items()):
                inside = frames[(frames >= span.start) & (frames < span.stop)].tolist()
                answer, lines = read_packed(predictions, expression, inside, size)
                void = targets.ignored(expression, inside) if self.protocol.is_ignoring else None
                scores[index].append(compare(answer, targets(expression, inside), void))
                unusable[index] |= lines
                answers.append(answer)
            observed.append(self.protocol.observe(video, answers, targets))
        of_video = joined(observed)
        measured = []
        for index, (expression, frames) in enumerate(scored.items()):
            unusable_T = np.isin(frames, list(unusable[index]))
            jf = JFScores(**joined([vars(part) for part in scores[index]]))
            jf = replace(jf, j_T=np.where(unusable_T, 0.0, jf.j_T), f_T=np.where(unusable_T, 0.0, jf.f_T))
            problems = tuple(unusable[index].values())
            measured.append(Measured(expression, index, size, jf, unusable_T, problems, of_video))
        return measured

    def _score(self, measured: Measured, predictions: VideoPredictions) -> ExpressionScore:
        expression, frames, visible_T = measured.expression, measured.frames, measured.visible_T
        nothing = predictions.no_answer(expression) if measured.problems else None
        has_answer = bool(frames.prediction_T.any())
        return ExpressionScore(
            video=expression.video,
            exp_id=expression.exp_id,
            text=expression.text,
            group=expression.group,
            num_frames=len(frames.j_T),
            has_target=bool(expression.annotation_ids),
            j=float(np.mean(frames.j_T)),
            f=float(np.mean(frames.f_T)),
            answer=Answer.masks if has_answer else Answer.missing if measured.problems else Answer.empty,
            j_visible=_mean_or_none(frames.j_T[visible_T]),
            f_visible=_mean_or_none(frames.f_T[visible_T]),
            false_positives=_mean_or_none(measured.answered_T[~visible_T]),
            measures=self.protocol.measure(measured),
            problems=(f"{expression.name}: {nothing}",) if nothing else measured.problems,
            is_counted=not (measured.problems and self.missing is Missing.drop),
        )


def _full_masks(measured: Sequence[Measured], scored: Mapping[Expression, np.ndarray]) -> dict[str, Doubt]:
    """The predictions that cover a frame which the truth does not."""
    doubts = {}
    for one in measured:
        num_pixels, counts = one.size[0] * one.size[1], one.frames
        for row in np.flatnonzero((counts.prediction_T == num_pixels) & (counts.target_T < num_pixels)):
            doubts[frame_name(one.expression, scored[one.expression][row])] = Doubt.full
    return doubts


def joined(chunks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays by name, put together from those of successive frames."""
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _mean_or_none(values_T: np.ndarray) -> float | None:
    return float(np.mean(values_T)) if values_T.size else None


# ------------------------------------------------------------------------------------------------- existence
#
# Whether what a sentence describes is to be seen at all: what each threshold on that would make of predictions. It
# only empties masks (``inference.existence_threshold``), so one prediction without it tells what every threshold gives.


def calibrate(
    dataset: DatasetConfig, predictions_dir: str | Path, num_workers: int = 1, max_videos: int | None = None
) -> Thresholds:
    """What every threshold on existence would make of predictions; the arguments are those of ``score_predictions``.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``score_predictions`` with ``missing=error``; or a video cannot be
            read, or none has a ground truth, or the predictions hold no object scores, or were made with a threshold.
    """
    check_predictions_dir(predictions_dir)
    all_videos = read_scored_videos(dataset)
    scorer = VideoScorer(dataset, Path(predictions_dir), Missing.error, is_deciding=True)
    videos = list(map_in_processes(scorer, all_videos[:max_videos], num_workers))
    unscorable = [line for video in videos for line in video.unscorable]
    if unscorable:
        raise ValueError(unscorable[0])
    undecided = [one for video in videos for one in video.undecided]
    if not undecided:
        raise ValueError(f"{dataset.name}: no expression of {len(videos)} videos has a ground truth in any frame")
    return Thresholds(undecided)


@dataclass(frozen=True)
class Undecided:
    """The scored frames of an expression, T of them, each with its mask and with an empty one in its place."""

    has_target: bool
    existence_T: np.ndarray
    """In [0, 1]: probability of [SEG] times object score."""
    kept_T: np.ndarray
    """J&F of the mask."""
    emptied_T: np.ndarray
    """J&F of the empty one."""
    answered_T: np.ndarray
    """bool: the mask has foreground."""

    @property
    def highest(self) -> float:
        """Existence up to which a threshold leaves any foreground; -1 if there is none to begin with."""
        return float(self.existence_T[self.answered_T].max(initial=-1))


@dataclass(frozen=True)
class Decision:
    """What a threshold makes of predictions; NaN where there is nothing to average."""

    threshold: float
    jf: float
    """J&F over all expressions."""
    n_acc: float
    """Share of the expressions without an object that get no foreground."""
    t_acc: float
    """Share of the expressions with an object that get some."""

    @property
    def final(self) -> float:
        """The mean of those that exist: the Final of MeViS v2, whose J&F counts the expressions without an object."""
        return mean_of(map(no_nan, (self.jf, self.n_acc, self.t_acc)))

    def row(self) -> dict[str, float]:
        """Of a table."""
        return {"J&F": self.jf, "N-acc": self.n_acc, "T-acc": self.t_acc, "Final": self.final}


class Thresholds:
    """What every threshold makes of some expressions.

    Args:
        expressions: at least one.
    """

    def __init__(self, expressions: Sequence[Undecided]):
        existence = np.concatenate([one.existence_T for one in expressions])
        gains = np.concatenate([(one.emptied_T - one.kept_T) / len(one.kept_T) for one in expressions])
        order = np.argsort(existence, kind="stable")
        self._levels = existence[order]
        kept = sum(float(np.mean(one.kept_T)) for one in expressions)
        self._jf = (kept + np.concatenate([[0.0], np.cumsum(gains[order])])) / len(expressions)
        self._highest = [
            np.sort([one.highest for one in expressions if one.has_target is kind]) for kind in (False, True)
        ]

    def at(self, thresholds_K: Sequence[float] | np.ndarray) -> list[Decision]:
        """What each comes to."""
        jf_K = self._jf[np.searchsorted(self._levels, thresholds_K)]
        n_acc_K, missed_K = (
            np.searchsorted(highest, thresholds_K) / (len(highest) or np.nan) for highest in self._highest
        )
        columns = (np.asarray(values_K).tolist() for values_K in (thresholds_K, jf_K, n_acc_K, 1 - missed_K))
        return [Decision(*values) for values in zip(*columns, strict=True)]

    @cached_property
    def best(self) -> Decision:
        """The lowest of highest Final, so that no mask is emptied for nothing."""
        levels = np.unique(np.append(self._levels, 1.0))
        return max(self.at(np.append(0.0, (levels[1:] + levels[:-1]) / 2)), key=lambda decision: decision.final)


def existence_table(thresholds: Thresholds, threshold: float) -> ScoreTable:
    """Predictions without and with a threshold."""
    names, decisions = ("as predicted", f"existence_threshold={threshold:g}"), thresholds.at([0.0, threshold])
    rows = {name: decision.row() for name, decision in zip(names, decisions, strict=True)}
    note = "Masks emptied where P([SEG]) times object score is below. Final: the mean of those that exist."
    return ScoreTable("existence", "Existence decision", rows, note)


def check_undecided(folder: Path) -> None:
    """Raise ValueError where predictions were made with a threshold, which cannot be undone."""
    made_by = read_object(folder / "predict.json") if (folder / "predict.json").is_file() else {}
    threshold = made_by.get("identity", {}).get("inference", {}).get("existence_threshold")
    if threshold:
        raise ValueError(
            f"{folder}: these predictions were made with inference.existence_threshold={threshold}, so masks are "
            "emptied already; predict without it into another folder"
        )


def read_existence(folder: Path, expression: Expression) -> np.ndarray:
    """(T,) in [0, 1], of all frames.

    Raises:
        FileNotFoundError, ValueError: the predictions hold no such values.
    """
    answers = read_answers(folder, expression)
    if any("object_score" not in answer for answer in answers):
        raise ValueError(f"{folder}: {expression.name} is predicted without object scores; predict it anew")
    return np.array([answer["score"] * answer["object_score"] for answer in answers])
