"""Draw predictions beside the ground truth: a strip per expression, an MP4 and a GIF per video.

    python scripts/show.py dataset=shapes_valid predictions=outputs/shapes/predictions output=outputs/look

Writes ``<output>/<video>/<exp_id>.png``, ``<video>.mp4`` and ``<video>.gif``, and prints their paths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from glus.config import ShowConfig
from glus.config.jobs import Jobs
from glus.data.benchmarks.index import by_video, open_masks, read_expressions
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.predictions import check_predictions_dir
from glus.evaluation.page import draw_strip, movie_frames, open_sources
from glus.painter import palette
from glus.pictures import check_movies, legend, write_movie
from glus.types import Expression

MOVIE_SIDE = 384
"""Longer side of a frame in a movie, in pixels."""


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
    ranks = defaultdict[str, Iterator[int]](count)
    return sorted(expressions, key=lambda expression: next(ranks[expression.group]))  # asked once for each, in order


def with_legend(sentences: Sequence[Expression], pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The pictures of a movie above the sentences and their colours."""
    for picture in pictures:
        below = legend([one.text for one in sentences], palette(len(sentences)), picture.shape[1])
        yield np.concatenate([picture, below])


def show(config: ShowConfig) -> list[Path]:
    """Write all pictures.

    Raises:
        FileNotFoundError: dataset or predictions are not where the config says.
        ValueError: a prediction is missing or unusable.
        OSError: no movie can be written.
    """
    check_movies(config.frames_per_second)
    check_predictions_dir(config.predictions)
    expressions = read_expressions(config.dataset)
    is_public = any(expression.annotation_ids for expression in expressions)
    truth, frames = open_masks(config.dataset) if is_public else None, FrameStore(config.dataset)
    written = []
    for chosen in choose_videos(expressions, config):
        video = DatasetVideo(frames, chosen[0].video, chosen[0].frames)
        read = open_sources(truth, {"prediction": Path(config.predictions)}, chosen)
        folder = Path(config.output) / chosen[0].video
        for one, colour in zip(chosen, palette(len(chosen)), strict=True):
            text = f"{one.text}  ({one.group})" if one.group else one.text
            picture = draw_strip(text, one, video, read, config.num_frames, colour)
            written.append(folder / f"{one.exp_id}.png")
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(written[-1])
        for suffix in (".mp4", ".gif"):
            pictures = with_legend(chosen, movie_frames(chosen, video, read, MOVIE_SIDE))
            written.append(folder.with_name(folder.name + suffix))
            write_movie(written[-1], pictures, config.frames_per_second)
    return written


if __name__ == "__main__":
    Jobs("show", ShowConfig, "output").start(lambda config: print(*show(config), sep="\n"))
