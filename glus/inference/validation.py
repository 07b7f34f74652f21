"""Scores of a model during training, on a few videos, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from glus import distributed
from glus.config import DatasetConfig
from glus.data.benchmarks.index import by_video, open_masks, read_expressions, require_texts
from glus.data.frames import DatasetVideo, FrameStore
from glus.inference.predictor import VideoPredictor
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
    """

    def __init__(
        self, predictor: VideoPredictor, dataset: DatasetConfig, metrics: Mapping[str, Metric], num_videos: int
    ):
        self.predictor = predictor
        self.metrics = metrics
        self.frames = FrameStore(dataset)
        self.masks = open_masks(dataset)
        expressions = read_expressions(dataset)
        require_texts(expressions)
        self.videos = by_video(expressions)[:num_videos]

    def __call__(self) -> dict[str, float]:
        """Mean of each metric, and of all of them ("J&F"); every rank calls it and gets the same."""
        sums: dict[str, float] = dict.fromkeys([*self.metrics, "count"], 0.0)
        self.predictor.glus.eval()
        try:
            for expressions in self.videos[distributed.rank() :: distributed.world_size()]:
                for name, value in self._score_video(expressions).items():
                    sums[name] += value
        finally:
            self.predictor.glus.train()
        sums = distributed.sum_over_ranks(sums, self.predictor.device)
        means = {name: 100 * sums[name] / sums["count"] for name in self.metrics}
        return {**means, "&".join(self.metrics): float(np.mean(list(means.values())))}

    def _score_video(self, expressions: Video) -> dict[str, float]:
        """Sums over the expressions of a video, folded frame by frame: masks of a whole video may fill gigabytes."""
        video = DatasetVideo(self.frames, expressions[0].video, expressions[0].frames)
        sums: dict[str, float] = dict.fromkeys(self.metrics, 0.0)
        for result in self.predictor.segment(video, [expression.text for expression in expressions]):
            for row, mask_HW in zip(result.rows, result.masks_RHW, strict=True):
                target_1HW = self.masks.read(expressions[row], [result.frame], mask_HW.shape)
                for name, metric in self.metrics.items():
                    sums[name] += float(metric(mask_HW[None], target_1HW)[0]) / len(video)
        return {**sums, "count": len(expressions)}
