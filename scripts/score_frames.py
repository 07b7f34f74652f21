"""Choose the key frame that each expression of a split is best predicted from, with the model that predicts.

    python scripts/score_frames.py dataset=shapes_valid weights=outputs/shapes output=outputs/shapes/frames
    python scripts/predict.py ... inference.key_frames=outputs/shapes/frames/key_frames.json

Every frame gets a score for every expression: what the model's IoU head expects (``model.iou_head``), or where it has
none, the probability of [SEG] times the stability of the mask that the frame gives by itself. Writes
``<output>/scores/<video>.json`` and, when all videos are scored, ``<output>/key_frames.json`` in the published
format. Any number of processes may share the videos, as in predict.py; a killed run is continued by the same command.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from glus import distributed
from glus.config import ScoreFramesConfig
from glus.config.jobs import Jobs
from glus.data.benchmarks.index import by_video, read_expressions
from glus.data.frames import DatasetVideo, FrameStore
from glus.inference.job import load_for_split
from glus.inference.key_frames import FrameScoreJob, KeyFrames
from glus.inference.predictor import VideoPredictor, check_folder_size
from glus.log import run_info, setup_logging
from glus.types import Video


def choose_key_frames(config: ScoreFramesConfig) -> KeyFrames:
    """What this process can claim of the split, and the key frames if all is done then.

    Raises:
        FileNotFoundError: dataset or weights are not where the config says.
        ValueError: they are damaged, too large for this machine, or ``output`` holds something else.
        OSError: ``output`` cannot be written.
    """
    distributed.use_device()  # before a published checkpoint is converted, which would else take the first GPU
    check_folder_size(config.weights, config.allow_cpu)
    expressions = read_expressions(config.dataset)
    videos = by_video(expressions)[: config.max_videos]
    predictor, identity = load_for_split(config, expressions)
    job = FrameScoreJob(config.output, identity, {"run": run_info(), "weights": config.weights})
    return job.run(videos, partial(score_video, predictor, job, FrameStore(config.dataset)))


def score_video(predictor: VideoPredictor, job: FrameScoreJob, frames: FrameStore, video: Video) -> Iterator[int]:
    """Score all frames of a video for all its expressions; yields the number of scores."""
    source = DatasetVideo(frames, video[0].video, video[0].frames)
    scores_ET = predictor.score_frames(source, [expression.text for expression in video])
    job.write(video, scores_ET)
    yield scores_ET.size


def choose_and_tell(config: ScoreFramesConfig) -> None:
    """Choose key frames, and print what has come out."""
    setup_logging()
    key_frames = choose_key_frames(config)
    if key_frames.done < key_frames.videos:
        process = f"process {distributed.rank() + 1} of {distributed.world_size()} has nothing left to do"
        print(f"{process}; {key_frames.done} of {key_frames.videos} videos are scored, the others are being scored")
    else:
        print(f"{key_frames.table()}\n{key_frames.file}")


if __name__ == "__main__":
    Jobs("score_frames", ScoreFramesConfig, "output").start(choose_and_tell)
