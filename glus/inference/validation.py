"""Scores of a model during training, on a few videos, shared among the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from glus import distributed
from glus.config import DatasetConfig
from glus.data.benchmarks.index import by_video, open_masks, read_expressions, require_annotations, require_texts
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.sampling import context_indices_eval
from glus.inference.predictor import VideoPredictor
from glus.log import Example
from glus.painter import Painter, numbers, palette
from glus.pictures import fit, legend, strip
from glus.types import Video

log = logging.getLogger(__name__)

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Validation:
    """Mean of each metric over the expressions of the first videos of a split, in percent.

    A quick look, not the final score: that is ``scripts/predict.py`` and ``scripts/score.py`` over the whole split. As
    there, frames without truth do not count, nor sentences without any such frame, which are not even asked.

    Args:
        predictor: wraps the model in training.
        dataset: a split with masks.
        metrics: name -> function of (T, H, W) prediction and target, giving one value per frame.
        num_videos: how many videos.
        show: takes all sentences with their scores and a picture, and the frames of a movie of the first video; called
            on rank 0. None: nothing is drawn.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed, or there is no truth. The same on every rank.
        OSError: the masks cannot be packed anywhere (see ``MaskPack``).
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
        require_annotations(dataset, expressions)
        require_texts(expressions)
        videos = by_video(expressions)[:num_videos]
        annotated = distributed.on_main(lambda: self._annotated(videos))
        self.annotated = {name: is_annotated_T for name, is_annotated_T in annotated.items() if is_annotated_T.any()}
        asked = [[expression for expression in video if expression.name in self.annotated] for video in videos]
        self.videos = [video for video in asked if video]
        if not self.videos:
            raise ValueError(f"dataset {dataset.name!r}: no frame of its first {len(videos)} videos has a ground truth")

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

    def _annotated(self, videos: Sequence[Video]) -> dict[str, np.ndarray]:
        """(T,) bool by name: the frames of each expression that have a truth, which is opened; tells what has none."""
        self.masks.open()
        annotated = {expression.name: self.masks.annotated(expression) for video in videos for expression in video}
        num_unscored = sum(int((~is_annotated_T).sum()) for is_annotated_T in annotated.values())
        if num_unscored:
            log.warning(
                "validation leaves out what has no ground truth: %d frames, among them all of %d of %d sentences",
                num_unscored, sum(not is_annotated_T.any() for is_annotated_T in annotated.values()), len(annotated),
            )  # fmt: skip
        return annotated

    def _score_video(self, expressions: Video, seen: _Seen) -> list[dict[str, float]]:
        """Scores of each expression of a video, folded frame by frame: masks of a whole video may fill gigabytes."""
        annotated = [self.annotated[expression.name] for expression in expressions]
        scores = [dict.fromkeys(self.metrics, 0.0) for _ in expressions]
        for result in self.predictor.segment(seen.video, [expression.text for expression in expressions]):
            for row, mask_HW in zip(result.rows, result.masks_RHW, strict=True):
                masks_1HW = [mask_HW[None]]
                if annotated[row][result.frame]:
                    masks_1HW.append(self.masks.read(expressions[row], [result.frame], mask_HW.shape))
                    for name, metric in self.metrics.items():
                        scores[row][name] += float(metric(*masks_1HW)[0]) / int(annotated[row].sum())
                if self.show:
                    seen.keep(row, result.frame, np.concatenate(masks_1HW))
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

    def keep(self, row: int, frame: int, masks_MHW: np.ndarray) -> None:
        """The answer to a sentence in a frame and, if that is known, the truth."""
        self._frames[frame], self._masks[row, frame] = fit(self.video.read(frame), masks_MHW > 0, self.SIDE)

    def examples(self, scores: Sequence[Mapping[str, float]]) -> list[Example]:
        """A strip of each sentence, of frames with truth."""
        found = []
        for row, (expression, values) in enumerate(zip(self.expressions, scores, strict=True)):
            known = [frame for frame in range(len(self.video)) if len(self._masks[row, frame]) == 2]
            chosen = [known[index] for index in sorted(set(context_indices_eval(len(known), self.STRIP_FRAMES)))]
            names, frames = [self.video.names[frame] for frame in chosen], [self._frames[frame] for frame in chosen]
            masks_F2HW = np.stack([self._masks[row, frame] for frame in chosen])
            lines = {"ground truth": masks_F2HW[:, 1], "prediction": masks_F2HW[:, 0]}
            picture = strip(expression.text, names, frames, lines, long_side=self.STRIP_SIDE)
            percent = {name: 100 * value for name, value in values.items()}
            found.append(Example(expression.text, expression.group, percent, picture))
        return found

    def movie(self) -> Iterator[np.ndarray]:
        """The video with all answers."""
        texts = [expression.text for expression in self.expressions]
        painter = Painter(numbers(len(texts)), palette(len(texts)))
        for frame, small in sorted(self._frames.items()):
            masks = np.stack([self._masks[row, frame][0] for row in range(len(texts))])
            picture = painter.draw(small, masks, self.video.names[frame])
            yield np.concatenate([picture, legend(texts, palette(len(texts)), picture.shape[1])])
