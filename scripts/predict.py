"""Segment every expression of a split with a trained model.

    python scripts/predict.py dataset=shapes_valid weights=outputs/quickstart output_dir=outputs/quickstart/predictions
    torchrun --nproc_per_node=4 scripts/predict.py dataset=mevis_valid_u weights=... output_dir=...
    srun --ntasks=8 --gpus-per-node=8 python scripts/predict.py dataset=mevis_valid_u weights=... output_dir=...

Writes ``<output_dir>/<video>/<exp_id>/<frame>.png``, or with ``format=rle`` one file ``<output_dir>/<video>.jsonl`` per
video. A video's predictions are there only when they are complete, so a killed run is continued by the same command,
with any number of processes. They share the videos as they go, need not meet, and may join at any time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from glus import distributed
from glus.config import PredictConfig, load_config
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.index import read_expressions
from glus.evaluation.score import by_video
from glus.inference.identity import prediction_identity
from glus.inference.keyframes import read_key_frames
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.progress import JobProgress
from glus.inference.record import Summary
from glus.inference.texts import check_lengths
from glus.inference.writer import PredictionWriter, Video
from glus.log import run_info, setup_logging

log = logging.getLogger(__name__)


def predict(config: PredictConfig) -> Summary:
    """What this process can claim of the split.

    Returns:
        The sum over all videos that are done by now, by whichever process.

    Raises:
        FileNotFoundError: dataset or weights are not where the config says.
        ValueError: they are damaged, or ``output_dir`` holds something else.
        OSError: ``output_dir`` cannot be written.
    """
    expressions = read_expressions(config.dataset)
    videos = by_video(expressions)[: config.max_videos]
    file = config.inference.key_frames
    key_frames = read_key_frames(file, [expression for video in videos for expression in video]) if file else None
    predictor, model = load_predictor(config.weights, config.inference)
    check_lengths(predictor, ((expression.name, expression.text) for expression in expressions))
    identity = prediction_identity(config.dataset, expressions, model.vocabulary.folder, model.config, file)
    about = {"run": run_info(), "weights": config.weights}
    writer = PredictionWriter(config.output_dir, identity, about, config.format)
    problems = predict_videos(predictor, writer, FrameStore(config.dataset), videos, key_frames)
    summary = writer.summarize(videos)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(videos)} videos could not be predicted ({summary.done} are done); repair them "
            "and run the same command again:\n" + "\n".join(problems)
        )
    return summary


def predict_videos(
    predictor: VideoPredictor,
    writer: PredictionWriter,
    frames: FrameStore,
    videos: Sequence[Video],
    key_frames: Mapping[str, int] | None,
) -> list[str]:
    """Predict what is neither done nor claimed by another process, the most expensive first, which balances the load.

    Args:
        predictor: the model.
        writer: where the masks go.
        frames: of the split.
        videos: all of them.
        key_frames: ``Expression.name`` -> index of the frame that it starts from; None: the first.

    Returns:
        A line for each video that cannot be read; the others are predicted nevertheless.
    """
    problems = []
    by_cost = sorted(enumerate(videos), key=lambda item: len(item[1]) * len(item[1][0].frames), reverse=True)
    with JobProgress(writer, videos, is_shown=distributed.rank() == 0) as progress:
        for number, video in by_cost:
            with writer.claim(number, video) as is_mine:
                if is_mine:
                    try:
                        starts = [key_frames[expression.name] for expression in video] if key_frames else None
                        predict_video(predictor, writer, frames, video, starts, progress)
                    except (ValueError, FileNotFoundError) as error:
                        log.error("video %s: %s", video[0].video, error)
                        problems.append(f"{video[0].video}: {error}")
    return problems


def predict_video(
    predictor: VideoPredictor,
    writer: PredictionWriter,
    frames: FrameStore,
    video: Video,
    key_frames: Sequence[int] | None,
    progress: JobProgress,
) -> None:
    """All expressions of a video together, each from its key frame (an index) if they have some."""
    source = DatasetVideo(frames, video[0].video, video[0].frames)
    before = dict(predictor.seconds)
    with writer.open(video) as masks:
        for result in predictor.segment(source, [expression.text for expression in video], key_frames):
            masks.write(result)
            progress.advance(len(result.rows), len(video))
        for stage, seconds in predictor.seconds.items():
            masks.record.add_seconds(stage, seconds - before.get(stage, 0.0))
    progress.finish(video)


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``PredictConfig``."""
    setup_logging()
    try:
        config = load_config(PredictConfig, cfg)
        summary = predict(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    rank = f"rank {distributed.rank()} of {distributed.world_size()}"
    if summary.done < summary.videos:
        print(f"{rank} is through; {summary.done} of {summary.videos} videos are done, the others are being predicted")
    else:
        print(f"{summary.table()}\n{Path(config.output_dir)}")


if __name__ == "__main__":
    main()
