"""Score a folder of predictions: exactly the expressions of the split, each prediction accounted for.

Predictions are PNGs or run-length codes (see ``predictions.py``) at the size of the video's frames. Work is shared by
videos among processes, and every mean is taken in dataset order, so scores do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from glus.config import DatasetConfig, Missing
from glus.data.benchmarks.index import by_video, read_expressions, require_annotations
from glus.data.frames import FrameStore
from glus.data.masks import open_masks
from glus.data.parallel import map_in_processes
from glus.data.predictions import VideoPredictions, check_predictions_dir, open_predictions, unexpected_files
from glus.data.rle import Size
from glus.evaluation.measured import Chunk, Measured, Observed
from glus.evaluation.packed import FrameScores, TargetReader, read_packed, score_frames
from glus.evaluation.protocols import RULES
from glus.evaluation.report import Answer, ExpressionScore, ObjectScore, Report, group_scores, summarize
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
    without_truth: tuple[str, ...]
    """Expressions that cannot be scored, which is no fault of the predictions."""
    num_unscored: int
    """Frames of all expressions for which there is no ground truth."""


def score_predictions(
    dataset: DatasetConfig,
    predictions_dir: str | Path,
    missing: Missing = Missing.zero,
    num_workers: int = 1,
    max_videos: int | None = None,
) -> Report:
    """J and F of every expression of a split, their means per group and overall, and the benchmark's own tables.

    Args:
        dataset: the split, with its ground truth.
        predictions_dir: folder of PNGs or run-length codes, see ``predictions.py``.
        missing: what a missing or unusable mask does. ``zero``: its frame scores 0, by every measure; ``drop``: its
            expression is left out of the means; ``error``: ValueError. The first two list it in the report.
        num_workers: scoring processes; 1 scores in this process. Scores do not depend on it.
        max_videos: only the first so many videos of the split.

    Raises:
        FileNotFoundError: the folder of predictions or a file of the dataset does not exist.
        ValueError: ``missing`` is ``error`` and a prediction is missing or unusable; a video is predicted in both
            forms; the split has no ground truth.
        OSError: the masks cannot be packed anywhere (see ``mask_cache``), or a scoring process died.
    """
    check_predictions_dir(predictions_dir)
    all_videos = read_scored_videos(dataset)
    open_scorer = partial(VideoScorer, dataset, Path(predictions_dir), missing)
    videos = list(map_in_processes(open_scorer, all_videos[:max_videos], num_workers))
    scores = [score for video in videos for score in video.expressions]
    objects = [score for video in videos for score in video.objects]
    is_dropping = missing is Missing.drop
    rules = RULES[dataset.protocol]
    return Report(
        dataset=dataset.name,
        split=dataset.split,
        predictions=str(predictions_dir),
        missing=missing.value,
        overall=summarize(scores),
        groups=group_scores(scores),
        expressions=tuple(scores),
        title=rules.title,
        official_missing=dataset.official_missing,
        objects=tuple(objects),
        tables=tuple(
            rules.tables(
                [score for score in scores if score.is_counted],
                [score for score in objects if score.is_complete or not is_dropping],
            )
        ),
        file_problems=tuple(problem for video in videos for problem in video.problems),
        without_truth=tuple(line for video in videos for line in video.without_truth),
        num_unscored=sum(video.num_unscored for video in videos),
        warnings=tuple(
            [warning for video in videos for warning in video.warnings]
            + unexpected_files(Path(predictions_dir), all_videos)
        ),
    )


class VideoScorer:
    """Scores the expressions of one video at a time; holds the open ground truth of the split."""

    def __init__(self, dataset: DatasetConfig, predictions_dir: Path, missing: Missing) -> None:
        self.predictions_dir = predictions_dir
        self.missing = missing
        self.masks = open_masks(dataset)
        self.frames = FrameStore(dataset)
        self.rules = RULES[dataset.protocol]
        self.observe = self.rules.open_observer(dataset) if self.rules.open_observer else None

    def __call__(self, video: Video) -> VideoScore:
        """The scores of these expressions, in their order.

        Raises:
            ValueError: a prediction is missing or unusable and ``missing`` is ``error``.
        """
        predictions = open_predictions(self.predictions_dir, video)
        scored = {expression: np.flatnonzero(self.masks.annotated(expression)) for expression in video}
        without = [expression for expression, frames in scored.items() if not frames.size]
        measured, unusable = self._measure({e: frames for e, frames in scored.items() if frames.size}, predictions)
        problems = [*predictions.problems, *(line for lines in unusable for line in lines)]
        if problems and self.missing is Missing.error:
            raise ValueError(f"{problems[0]} (missing=error stops at the first)")
        scores = []
        for one, lines in zip(measured, unusable, strict=True):
            nothing = predictions.no_answer(one.expression) if lines else None
            listed = (f"{one.expression.name}: {nothing}",) if nothing else lines
            scores.append(self._score(one, listed))
        return VideoScore(
            scores,
            self.rules.match(measured),
            predictions.problems,
            predictions.warnings,
            tuple(f"{expression.name}: no frame has a ground truth" for expression in without),
            sum(len(expression.frames) - len(frames) for expression, frames in scored.items()),
        )

    def _measure(
        self, scored: dict[Expression, np.ndarray], predictions: VideoPredictions
    ) -> tuple[list[Measured], list[tuple[str, ...]]]:
        """What is counted of each expression in the frames that are scored, and a line for each of these that could
        not be read."""
        video = list(scored)
        if not video:
            return [], []
        size = self.frames.size(video[0].video, video[0].frames[0])
        chunks: list[list[FrameScores]] = [[] for _ in video]
        unusable: list[dict[int, str]] = [{} for _ in video]
        observed: list[Observed] = []
        num_frames = max(len(expression.frames) for expression in video)
        for start in range(0, num_frames, CHUNK_FRAMES):
            span = range(start, min(start + CHUNK_FRAMES, num_frames))
            targets = TargetReader(self.masks, span, size)
            masks = []
            for index, (expression, frames) in enumerate(scored.items()):
                inside = frames[(frames >= span.start) & (frames < span.stop)].tolist()
                prediction, lines = read_packed(predictions, expression, inside, size)
                void = targets.ignored(expression, inside) if self.rules.is_ignoring else None
                chunks[index].append(score_frames(prediction, targets(expression, inside), void))
                unusable[index] |= lines
                masks += [prediction] if self.observe else []
            if self.observe:
                observed.append(self.observe(Chunk(video, span, size, masks, targets, self.masks)))
        together = {name: np.concatenate([chunk[name] for chunk in observed]) for name in (observed or [{}])[0]}
        measured = [
            _measured(expression, frames, size, chunks[index], unusable[index], together, index)
            for index, (expression, frames) in enumerate(scored.items())
        ]
        return measured, [tuple(lines.values()) for lines in unusable]

    def _score(self, measured: Measured, problems: tuple[str, ...]) -> ExpressionScore:
        expression, frames = measured.expression, measured.frames
        visible_T = measured.visible_T
        has_answer = bool(frames.prediction_T.any())
        answer = Answer.masks if has_answer else Answer.missing if measured.unusable_T.any() else Answer.empty
        return ExpressionScore(
            video=expression.video,
            exp_id=expression.exp_id,
            text=expression.text,
            group=expression.group,
            num_frames=len(frames.j_T),
            has_target=bool(expression.annotation_ids),
            j=float(np.mean(frames.j_T)),
            f=float(np.mean(frames.f_T)),
            answer=answer,
            j_visible=_mean_or_none(frames.j_T[visible_T]),
            f_visible=_mean_or_none(frames.f_T[visible_T]),
            false_positives=_mean_or_none(measured.answered_T[~visible_T]),
            measures=self.rules.measure(measured),
            problems=problems,
            is_counted=not (problems and self.missing is Missing.drop),
        )


def _measured(
    expression: Expression,
    scored: np.ndarray,
    size: Size,
    chunks: Sequence[FrameScores],
    unusable: dict[int, str],
    observed: Observed,
    index: int,
) -> Measured:
    """The chunks of one expression put together; J and F are 0 where a prediction could not be read."""
    arrays = {
        field.name: np.concatenate([getattr(chunk, field.name) for chunk in chunks]) for field in fields(FrameScores)
    }
    unusable_T = np.isin(scored, list(unusable))
    for name in ("j_T", "f_T"):
        arrays[name] = np.where(unusable_T, 0.0, arrays[name])
    return Measured(expression, size, FrameScores(**arrays), unusable_T, observed, index)


def _mean_or_none(values_T: np.ndarray) -> float | None:
    return float(np.mean(values_T)) if values_T.size else None


def read_scored_videos(dataset: DatasetConfig) -> list[Video]:
    """``by_video`` of a split with ground truth.

    Raises:
        FileNotFoundError: the expression file does not exist.
        ValueError: the file is not as expected, or the split has no public ground truth.
    """
    expressions = read_expressions(dataset)
    require_annotations(dataset, expressions)
    return by_video(expressions)
