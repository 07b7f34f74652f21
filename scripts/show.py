"""Draw predictions beside the ground truth: a strip per expression, an MP4 and a GIF per video.

    python scripts/show.py dataset=shapes_valid predictions=outputs/shapes/predictions output=outputs/look

Writes ``<output>/<video>/<exp_id>.png``, ``<video>.mp4`` and ``<video>.gif``, and prints their paths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from PIL import Image

from glus.config import ShowConfig
from glus.config.jobs import Jobs
from glus.data.benchmarks.index import by_video, open_masks, read_expressions
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.masks import MaskStore
from glus.data.predictions import open_predictions
from glus.data.sampling import context_indices_eval
from glus.evaluation.packed import read_complete
from glus.painter import Colour, Painter, numbers, palette
from glus.pictures import check_movies, fit, legend, side_by_side, strip, titled, write_movie
from glus.types import Expression

MOVIE_SIDE = 384
"""Longer side of a frame in a movie, in pixels."""


class MaskReader:
    """Masks of expressions by source, "ground truth" (where it is public) and "prediction".

    Args:
        predictions_dir: folder of PNGs or run-length codes.
        masks: the ground truth, or None where it is not public.
    """

    def __init__(self, predictions_dir: Path, masks: MaskStore | None):
        self.predictions_dir = predictions_dir
        self.masks = masks

    def read(self, expression: Expression, frames: Sequence[int], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Source -> (F, H, W) bool.

        Raises:
            ValueError: a prediction is missing or unusable.
        """
        predictions = open_predictions(self.predictions_dir, [expression])
        masks = read_complete(predictions, expression, frames, size, "pictures need complete predictions: see score.py")
        predicted = masks.to_dense() > 0
        if self.masks is None:
            return {"prediction": predicted}
        return {"ground truth": self.masks.read(expression, frames, size) > 0, "prediction": predicted}


def choose_videos(expressions: Sequence[Expression], config: ShowConfig) -> list[list[Expression]]:
    """The sentences to show of each video to show, drawn from the groups in turn.

    Raises:
        ValueError: ``config.videos`` names one that the split does not have.
    """
    videos = {group[0].video: group for group in by_video(expressions)}
    wanted = config.videos if config.videos is not None else list(videos)[: config.max_videos]
    unknown = [video for video in wanted if video not in videos]
    if unknown:
        raise ValueError(f"videos: the split has no {unknown[0]!r}; it has {', '.join(list(videos)[:5])}, ...")
    return [_in_turn(videos[video])[: config.num_expressions] for video in wanted]


def _in_turn(expressions: Sequence[Expression]) -> list[Expression]:
    """The first of each group, then the second of each, and so on."""
    earlier: dict[str, int] = {}
    ranks = []
    for expression in expressions:
        ranks.append(earlier.get(expression.group, 0))
        earlier[expression.group] = ranks[-1] + 1
    return [expression for _, expression in sorted(zip(ranks, expressions, strict=True), key=lambda pair: pair[0])]


def write_strip(
    path: Path, expression: Expression, video: DatasetVideo, reader: MaskReader, num_frames: int, colour: Colour
) -> None:
    """The strip of one sentence, over frames spread over the video."""
    chosen = sorted(set(context_indices_eval(len(video), num_frames)))
    frames = [video.read(index) for index in chosen]
    rows = reader.read(expression, chosen, frames[0].shape[:2])
    text = f"{expression.text}  ({expression.group})" if expression.group else expression.text
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(strip(text, [video.names[index] for index in chosen], frames, rows, colour)).save(path)


def movie_frames(expressions: Sequence[Expression], video: DatasetVideo, reader: MaskReader) -> Iterator[np.ndarray]:
    """Every frame once per source of masks, all sentences in their colours, above the legend."""
    colours = palette(len(expressions))
    texts = [expression.text for expression in expressions]
    painters = defaultdict[str, Painter](lambda: Painter(numbers(len(texts)), colours))
    for index, name in enumerate(video.names):
        frame = video.read(index)
        masks = [reader.read(expression, [index], frame.shape[:2]) for expression in expressions]
        panels = []
        for source in masks[0]:
            scaled = fit(frame, np.concatenate([answer[source] for answer in masks]), MOVIE_SIDE)
            panels.append(titled(painters[source].draw(*scaled, name), source))
        picture = side_by_side(panels)
        yield np.concatenate([picture, legend(texts, colours, picture.shape[1])])


def show(config: ShowConfig) -> list[Path]:
    """Write all pictures.

    Raises:
        FileNotFoundError: dataset or predictions are not where the config says.
        ValueError: a prediction is missing or unusable.
        OSError: no movie can be written.
    """
    check_movies(config.frames_per_second)
    if not Path(config.predictions).is_dir():
        raise FileNotFoundError(f"no folder of predictions at {config.predictions}")
    expressions = read_expressions(config.dataset)
    is_public = any(expression.annotation_ids for expression in expressions)
    reader = MaskReader(Path(config.predictions), open_masks(config.dataset) if is_public else None)
    frames = FrameStore(config.dataset)
    written = []
    for chosen in choose_videos(expressions, config):
        video = DatasetVideo(frames, chosen[0].video, chosen[0].frames)
        folder = Path(config.output) / chosen[0].video
        for expression, colour in zip(chosen, palette(len(chosen)), strict=True):
            written.append(folder / f"{expression.exp_id}.png")
            write_strip(written[-1], expression, video, reader, config.num_frames, colour)
        for suffix in (".mp4", ".gif"):
            written.append(folder.with_name(folder.name + suffix))
            write_movie(written[-1], movie_frames(chosen, video, reader), config.frames_per_second)
    return written


_JOBS = Jobs("show", ShowConfig, "output")


@hydra.main(version_base="1.3", config_path="../configs", config_name="show")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``ShowConfig``."""
    _JOBS.take(cfg)


if __name__ == "__main__":
    _JOBS.run(main, lambda config: print(*show(config), sep="\n"))
