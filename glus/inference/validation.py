"""Scores of a model during training, on a few videos, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from glus import distributed
from glus.config import DatasetConfig
from glus.data.benchmarks.index import by_video, open_masks, read_expressions, require_texts
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.sampling import context_indices_eval
from glus.inference.predictor import VideoPredictor
from glus.log import Example
from glus.painter import Painter, numbers, palette
from glus.pictures import fit, legend, strip
from glus.types import Video

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Validation:
    """Mean of each metric over the expressions of the first videos of a split, in percent.

    A quick look, not the final score: that is ``scripts/predict.py`` and ``scripts/score.py`` over the whole split.

    Args:
        predictor: wraps the model in training.
        dataset: a split with masks.
        metrics: name -> function of (T, H, W) prediction and target, giving one value per frame.
        num_videos: how many videos.
        show: takes all sentences with their scores and a picture, and the frames of a movie of the first video; called
            on rank 0. None: nothing is drawn.
    """

    def __init__(
        self,
        predictor: VideoPredictor,
        dataset: DatasetConfig,
        metrics: Mapping[str, Metric],
        num_videos: int,
        show: Callable[[Sequence[Example], Sequence[np.ndarray]], None] | None = None,
    ):
        self.predictor = predictor
        self.show = show
        self.metrics = metrics
        self.frames = FrameStore(dataset)
        self.masks = open_masks(dataset)
        expressions = read_expressions(dataset)
        require_texts(expressions)
        self.videos = by_video(expressions)[:num_videos]

    def __call__(self) -> dict[str, float]:
        """Mean of each metric, and of all of them ("J&F"); every rank calls it and gets the same."""
        rows: list[dict[str, float]] = []
        examples: list[Example] = []
        movie: list[np.ndarray] = []
        self.predictor.glus.eval()
        try:
            for expressions in self.videos[distributed.rank() :: distributed.world_size()]:
                seen = _Seen(expressions, DatasetVideo(self.frames, expressions[0].video, expressions[0].frames))
                scored = self._score_video(expressions, seen)
                rows += scored
                if self.show:
                    examples += seen.examples(scored)
                    movie = movie or list(seen.movie())
        finally:
            self.predictor.glus.train()
        if self.show:
            everyone = [example for of_rank in distributed.gather(examples) for example in of_rank]
            if distributed.rank() == 0:
                self.show(everyone, movie)
        sums = {name: sum(row[name] for row in rows) for name in self.metrics} | {"count": float(len(rows))}
        sums = distributed.sum_over_ranks(sums, self.predictor.device)
        means = {name: 100 * sums[name] / sums["count"] for name in self.metrics}
        return {**means, "&".join(self.metrics): float(np.mean(list(means.values())))}

    def _score_video(self, expressions: Video, seen: _Seen) -> list[dict[str, float]]:
        """Scores of each expression of a video, folded frame by frame: masks of a whole video may fill gigabytes."""
        scores = [dict.fromkeys(self.metrics, 0.0) for _ in expressions]
        for result in self.predictor.segment(seen.video, [expression.text for expression in expressions]):
            for row, mask_HW in zip(result.rows, result.masks_RHW, strict=True):
                target_1HW = self.masks.read(expressions[row], [result.frame], mask_HW.shape)
                for name, metric in self.metrics.items():
                    scores[row][name] += float(metric(mask_HW[None], target_1HW)[0]) / len(seen.video)
                if self.show:
                    seen.keep(row, result.frame, mask_HW, target_1HW[0])
        return scores


class _Seen:
    """What is kept of a video to be drawn: its frames and masks, as small as they will be shown.

    Args:
        expressions: of the video.
        video: its frames.
    """

    SIDE, STRIP_SIDE, STRIP_FRAMES = 320, 200, 4

    def __init__(self, expressions: Video, video: DatasetVideo):
        self.expressions, self.video = expressions, video
        self._masks: dict[tuple[int, int], np.ndarray] = {}
        self._frames: dict[int, np.ndarray] = {}

    def keep(self, row: int, frame: int, answer_HW: np.ndarray, target_HW: np.ndarray) -> None:
        """Both masks of a sentence in a frame."""
        small, masks = fit(self.video.read(frame), np.stack([target_HW, answer_HW]) > 0, self.SIDE)
        self._frames[frame], self._masks[row, frame] = small, masks

    def examples(self, scores: Sequence[Mapping[str, float]]) -> list[Example]:
        """A strip of each sentence."""
        chosen = sorted(set(context_indices_eval(len(self.video), self.STRIP_FRAMES)))
        names, frames = [self.video.names[frame] for frame in chosen], [self._frames[frame] for frame in chosen]
        found = []
        for row, (expression, values) in enumerate(zip(self.expressions, scores, strict=True)):
            masks_F2HW = np.stack([self._masks[row, frame] for frame in chosen])
            lines = {"ground truth": masks_F2HW[:, 0], "prediction": masks_F2HW[:, 1]}
            picture = strip(expression.text, names, frames, lines, long_side=self.STRIP_SIDE)
            percent = {name: 100 * value for name, value in values.items()}
            found.append(Example(expression.text, expression.group, percent, picture))
        return found

    def movie(self) -> Iterator[np.ndarray]:
        """The video with all answers."""
        texts = [expression.text for expression in self.expressions]
        painter = Painter(numbers(len(texts)), palette(len(texts)))
        for frame, small in sorted(self._frames.items()):
            masks = np.stack([self._masks[row, frame][1] for row in range(len(texts))])
            picture = painter.draw(small, masks, self.video.names[frame])
            yield np.concatenate([picture, legend(texts, palette(len(texts)), picture.shape[1])])
