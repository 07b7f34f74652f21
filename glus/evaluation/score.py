"""Score a folder of predictions: exactly the expressions of the split, each prediction accounted for.

Predictions are PNGs or run-length codes (see ``predictions.py``) at the size of the video's frames. Work is shared by
videos among processes, and every mean is taken in dataset order, so scores do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    unexpected_files,
)
from glus.evaluation.existence import Thresholds, Undecided, check_undecided, existence_table, read_existence
from glus.evaluation.packed import JFScores, TargetReader, compare, read_packed
from glus.evaluation.protocols import PROTOCOLS, Measured, Observed
from glus.evaluation.report import Answer, ExpressionScore, ObjectScore, ScoreReport
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
    """Why the dataset's own files allow no score of this video, if they do not."""
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
    tables = scorer.protocol.tables(
        [score for score in scores if score.is_counted],
        [score for score in objects if score.is_complete or missing is not Missing.drop],
    )
    undecided = [one for video in videos for one in video.undecided]
    if existence_threshold is not None and undecided:
        tables.append(existence_table(Thresholds(undecided), existence_threshold))
    warnings = [warning for video in videos for warning in video.warnings]
    return ScoreReport(
        dataset=dataset.name,
        split=dataset.split,
        predictions=str(predictions_dir),
        missing=missing.value,
        official_missing=dataset.official_missing,
        protocol=scorer.protocol.title,
        expressions=tuple(scores),
        objects=tuple(objects),
        tables=tuple(tables),
        file_problems=tuple(problem for video in videos for problem in video.problems),
        num_unscored=sum(video.num_unscored for video in videos),
        without_truth=tuple(line for video in videos for line in video.without_truth),
        warnings=(*warnings, *unexpected_files(folder, all_videos)),
        doubts=tuple(count_doubts({name: doubt for video in videos for name, doubt in video.doubts.items()})),
        unscorable=tuple(line for video in videos for line in video.unscorable),
    )


def calibrate(
    dataset: DatasetConfig, predictions_dir: str | Path, num_workers: int = 1, max_videos: int | None = None
) -> Thresholds:
    """What every threshold on existence would make of predictions; the arguments are those of ``score_predictions``.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``score_predictions`` with ``missing=error``; or a video cannot be
            read, or the predictions hold no object scores, or were made with a threshold.
    """
    check_predictions_dir(predictions_dir)
    all_videos = read_scored_videos(dataset)
    scorer = VideoScorer(dataset, Path(predictions_dir), Missing.error, is_deciding=True)
    videos = list(map_in_processes(scorer, all_videos[:max_videos], num_workers))
    unscorable = [line for video in videos for line in video.unscorable]
    if unscorable:
        raise ValueError(unscorable[0])
    return Thresholds([one for video in videos for one in video.undecided])


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
        predictions = open_predictions(self.predictions_dir, video)
        try:
            scored = {expression: np.flatnonzero(self.masks.annotated(expression)) for expression in video}
            measured = self._measure({e: frames for e, frames in scored.items() if frames.size}, predictions)
        except (ValueError, FileNotFoundError) as error:  # of a frame or of the truth; the other videos can be scored
            return VideoScore([], [], (), (), {}, [], 0, (f"{video[0].dataset}/{video[0].video}: {error}",))
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
