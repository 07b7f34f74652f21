"""Score a folder of predictions: exactly the expressions of the split, each prediction accounted for.

A prediction is ``<folder>/<video>/<exp_id>/<frame>.png`` at the size of the video's frames; any non-zero pixel is
foreground. Work is shared by videos among processes, and every mean is taken in dataset order, so scores do not depend
on the number of processes.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image

from glus.config import DatasetConfig, Missing
from glus.data.frames import FrameStore
from glus.data.index import read_expressions, require_annotations
from glus.data.masks import open_masks
from glus.evaluation.metrics import boundary_accuracy, region_similarity
from glus.evaluation.report import Answer, ExpressionScore, Report, group_scores, summarize
from glus.structures import Expression

CHUNK_FRAMES = 32
"""Frames in memory at a time, so that memory does not grow with the video."""

Video = list[Expression]
Result = TypeVar("Result")


def score_predictions(
    dataset: DatasetConfig,
    predictions_dir: str | Path,
    missing: Missing = Missing.zero,
    num_workers: int = 1,
    max_videos: int | None = None,
) -> Report:
    """J and F of every expression of a split, their means per group and overall.

    Args:
        dataset: the split, with its ground truth.
        predictions_dir: folder ``<video>/<exp_id>/<frame>.png``.
        missing: what a missing or unusable PNG does. ``zero``: its frame scores 0 in J and F; ``drop``: its
            expression is left out of the means; ``error``: ValueError. The first two list it in the report.
        num_workers: scoring processes; 1 scores in this process. Scores do not depend on it.
        max_videos: only the first so many videos of the split.

    Raises:
        FileNotFoundError: the folder of predictions or a file of the dataset does not exist.
        ValueError: ``missing`` is ``error`` and a prediction is missing or unusable; the split has no ground truth.
        RuntimeError: a scoring process died.
    """
    check_predictions_dir(predictions_dir)
    videos = read_scored_videos(dataset)
    open_scorer = partial(VideoScorer, dataset, Path(predictions_dir), missing)
    scores = [score for video in map_videos(open_scorer, videos[:max_videos], num_workers) for score in video]
    return Report(
        dataset=dataset.name,
        split=dataset.split,
        predictions=str(predictions_dir),
        missing=missing.value,
        overall=summarize(scores),
        groups=group_scores(scores),
        expressions=tuple(scores),
        warnings=tuple(unexpected_predictions(Path(predictions_dir), videos)),
    )


class VideoScorer:
    """Scores the expressions of one video at a time; holds the open ground truth of the split."""

    def __init__(self, dataset: DatasetConfig, predictions_dir: Path, missing: Missing) -> None:
        self.predictions_dir = predictions_dir
        self.missing = missing
        self.masks = open_masks(dataset)
        self.frames = FrameStore(dataset)

    def __call__(self, video: Video) -> list[ExpressionScore]:
        """The scores of these expressions, in their order."""
        size = self.frames.size(video[0].video, video[0].frames[0])
        return [self.score(expression, size) for expression in video]

    def score(self, expression: Expression, size: tuple[int, int]) -> ExpressionScore:
        """The score of one expression over all its frames of ``size`` (H, W).

        Raises:
            ValueError: a prediction is missing or unusable and ``missing`` is ``error``.
        """
        num_frames = len(expression.frames)
        scores = np.zeros((2, num_frames))
        problems: dict[int, str] = {}
        is_empty = True
        for start in range(0, num_frames, CHUNK_FRAMES):
            frames = range(start, min(start + CHUNK_FRAMES, num_frames))
            prediction, unusable = read_prediction(self.predictions_dir, expression, frames, size)
            target = self.masks.read(expression, frames, size)
            readable = [i for i, frame in enumerate(frames) if frame not in unusable]
            scores[0, start:][readable] = region_similarity(prediction[readable], target[readable])
            scores[1, start:][readable] = boundary_accuracy(prediction[readable], target[readable])
            problems |= unusable
            is_empty &= not prediction.any()
        if problems and self.missing is Missing.error:
            raise ValueError(f"{next(iter(problems.values()))} (missing=error stops at the first)")
        answer = Answer.masks if not is_empty else Answer.missing if len(problems) == num_frames else Answer.empty
        return ExpressionScore(
            video=expression.video,
            exp_id=expression.exp_id,
            text=expression.text,
            group=expression.group,
            num_frames=num_frames,
            has_target=bool(expression.annotation_ids),
            j=float(np.mean(scores[0])),
            f=float(np.mean(scores[1])),
            answer=answer,
            problems=self._listed(expression, problems),
            is_counted=not (problems and self.missing is Missing.drop),
        )

    def _listed(self, expression: Expression, problems: dict[int, str]) -> tuple[str, ...]:
        """One line per frame, or one for the whole expression if its folder does not exist."""
        folder = expression_dir(self.predictions_dir, expression)
        if problems and not folder.is_dir():
            return (f"{expression.name}: no folder {folder}",)
        return tuple(problems.values())


def read_prediction(
    predictions_dir: Path, expression: Expression, frames: Sequence[int], size: tuple[int, int]
) -> tuple[np.ndarray, dict[int, str]]:
    """The predicted masks of some frames of an expression.

    Returns:
        (F, H, W) bool, all False in frames that could not be read; and for each of those its frame index with a line
        that says what is wrong.
    """
    masks_FHW = np.zeros((len(frames), *size), dtype=bool)
    unusable = {}
    for row, frame in enumerate(frames):
        name = expression.frames[frame]
        try:
            masks_FHW[row] = read_mask(expression_dir(predictions_dir, expression) / f"{name}.png", size)
        except UnusablePrediction as error:
            unusable[frame] = f"{expression.name}, frame {name}: {error}"
    return masks_FHW, unusable


class UnusablePrediction(Exception):
    """A prediction that cannot be scored; the message says what is wrong with which file."""


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A mask file as (H, W) bool, foreground where any colour channel is not 0.

    Reads every PNG (1-bit, grey, palette indices, colour; alpha is ignored) and trusts none: checksums are verified,
    since a damaged file can otherwise decode to a partly black mask.

    Raises:
        UnusablePrediction: the file is missing, does not decode, or is not of ``size`` (H, W).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UnusablePrediction(f"{path} {reason}") from error
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(image)
            num_colours = pixels.shape[2] - image.mode.endswith("A") if pixels.ndim == 3 else 1
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusablePrediction(f"{path} is not a readable PNG (damaged or cut short)") from error
    if pixels.shape[:2] != size:
        found, expected = ("x".join(map(str, shape)) for shape in (pixels.shape[:2], size))
        raise UnusablePrediction(f"{path} is {found}, but the video's frames are {expected} (height x width)")
    return np.any(pixels.reshape(*size, -1)[..., :num_colours], axis=2)


def expression_dir(predictions_dir: Path, expression: Expression) -> Path:
    """Where the masks of an expression lie; video ids may contain slashes."""
    return predictions_dir / expression.prediction_dir


def unexpected_predictions(predictions_dir: Path, videos: Sequence[Video]) -> list[str]:
    """Folders with PNGs that belong to no expression, and PNGs that belong to no frame, as sorted lines."""
    expected = {expression_dir(predictions_dir, expression): expression for video in videos for expression in video}
    lines = []
    for folder, subfolders, names in os.walk(predictions_dir):
        subfolders.sort()
        pngs = {name.removesuffix(".png") for name in names if name.endswith(".png")}
        expression = expected.get(Path(folder))
        if expression is None and pngs:
            lines.append(f"{folder}: {len(pngs)} PNGs of no expression")
        elif expression is not None and (extra := sorted(pngs.difference(expression.frames))):
            lines.append(f"{folder}: {len(extra)} PNGs of no frame, the first {extra[0]}.png")
    return lines


def check_predictions_dir(predictions_dir: str | Path) -> None:
    """Raise FileNotFoundError unless the folder exists: a misspelt path is no prediction that scores 0."""
    if not Path(predictions_dir).is_dir():
        raise FileNotFoundError(
            f"no folder of predictions {predictions_dir}; expected <video>/<exp_id>/<frame>.png in it"
        )


def read_scored_videos(dataset: DatasetConfig) -> list[Video]:
    """The expressions of each video of a split with ground truth, videos in the order of the expression file.

    Raises:
        FileNotFoundError: the expression file does not exist.
        ValueError: the file is not as expected, or the split has no public ground truth.
    """
    expressions = read_expressions(dataset)
    require_annotations(dataset, expressions)
    videos: dict[str, Video] = {}
    for expression in expressions:
        videos.setdefault(expression.video, []).append(expression)
    return list(videos.values())


def map_videos(
    open_scorer: Callable[[], Callable[[Video], Result]], videos: Sequence[Video], num_workers: int
) -> Iterator[Result]:
    """Apply a scorer to each video, in order, in ``num_workers`` processes or, for 1, in this one.

    Args:
        open_scorer: makes the scorer, once per process; must pickle if there are several.
        videos: the work.
        num_workers: processes; they are started clean, not forked from this one and its threads.

    Raises:
        RuntimeError: a process died (killed, out of memory). Whatever the scorer itself raises is passed on.
    """
    num_workers = min(num_workers, len(videos))
    if num_workers <= 1:
        scorer = open_scorer()
        yield from map(scorer, videos)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    with ProcessPoolExecutor(num_workers, context, _start_worker, (open_scorer,)) as pool:
        try:
            yield from pool.map(_run_worker, videos)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a scoring process died, probably killed for want of memory: run again with fewer num_workers"
            ) from error


_open_scorer: Callable[[], Callable[[Video], Any]] | None = None
_scorer: Callable[[Video], Any] | None = None
"""A worker process's own scorer; None in the main process."""


def _start_worker(open_scorer: Callable[[], Callable[[Video], Any]]) -> None:
    global _open_scorer
    _open_scorer = open_scorer
    cv2.setNumThreads(0)  # the processes are the parallelism


def _run_worker(video: Video) -> Any:
    """Opens the scorer with the first video, not at the start, so that its error reaches the user as it is."""
    global _scorer
    assert _open_scorer is not None
    if _scorer is None:
        _scorer = _open_scorer()
    return _scorer(video)
