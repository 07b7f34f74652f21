"""Segment every expression of a split with a trained model.

    python scripts/predict.py dataset=shapes_valid weights=outputs/shapes output=outputs/shapes/predictions
    torchrun --nproc_per_node=4 scripts/predict.py dataset=mevis_valid_u weights=... output=...
    srun --ntasks=8 --gpus-per-node=8 python scripts/predict.py dataset=mevis_valid_u weights=... output=...

Writes ``<output>/<video>/<exp_id>/<frame>.png``, or with ``format=rle`` one file ``<output>/<video>.jsonl`` per
video; ``dataset=[a,b]`` predicts several splits, into ``<output>/a`` and ``<output>/b``. A video's predictions are
there only when they are complete, so a killed run is continued by the same command, with any number of processes. They
share the videos as they go, need not meet, and may join at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from glus import distributed
from glus.config import PredictConfig
from glus.config.jobs import Jobs
from glus.console import tables
from glus.data.benchmarks.index import by_video, read_expressions
from glus.data.frames import DatasetVideo, FrameStore
from glus.evaluation.report import print_rows
from glus.files import read_object
from glus.inference.job import COST_FILE, PredictionJob, Summary, load_for_split
from glus.inference.key_frames import read_key_frames
from glus.inference.predictor import VideoPredictor, check_folder_size
from glus.log import run_info, setup_logging
from glus.types import Video


def predict(config: PredictConfig) -> Summary:
    """What this process can claim of the split.

    Returns:
        The sum over all videos that are done by now, by whichever process.

    Raises:
        FileNotFoundError: dataset or weights are not where the config says.
        ValueError: they are damaged, too large for this machine, or ``output`` holds something else.
        OSError: ``output`` cannot be written.
    """
    distributed.use_device()  # before a published checkpoint is converted, which would else take the first GPU
    check_folder_size(config.weights, config.allow_cpu)
    expressions = read_expressions(config.dataset)
    videos = by_video(expressions)[: config.max_videos]
    file = config.inference.key_frames
    key_frames = read_key_frames(file, [expression for video in videos for expression in video]) if file else None
    predictor, identity = load_for_split(config, expressions, file)
    job = PredictionJob(config.output, identity, {"run": run_info(), "weights": config.weights}, config.format)
    return job.run(videos, partial(predict_video, predictor, job, FrameStore(config.dataset), key_frames))


def predict_video(
    predictor: VideoPredictor, job: PredictionJob, frames: FrameStore, key_frames: dict[str, int] | None, video: Video
) -> Iterator[int]:
    """Predict all expressions of a video together, each from its key frame.

    Args:
        predictor: the model.
        job: takes the masks.
        frames: of the split.
        key_frames: ``Expression.name`` -> index of the frame that it starts from; None: the first.
        video: not done, and claimed by this process.

    Returns:
        How many masks each result has, while they are predicted.
    """
    starts = [key_frames[expression.name] for expression in video] if key_frames else None
    source = DatasetVideo(frames, video[0].video, video[0].frames)
    results = predictor.segment(source, [expression.text for expression in video], starts)
    return job.write(video, results, predictor.seconds)


def predict_and_tell(config: PredictConfig) -> None:
    """Predict, and print what has come out."""
    setup_logging()
    summary = predict(config)
    if summary.done < summary.videos:
        process = f"process {distributed.rank() + 1} of {distributed.world_size()} has nothing left to do"
        print(f"{process}; {summary.done} of {summary.videos} videos are done, the others are being predicted")
    else:
        print(f"{summary.table()}\n{Path(config.output)}")


def print_predicted(configs: dict[str, PredictConfig], finished: Collection[str]) -> None:
    """A line for each of several splits."""
    rows = {}
    for name, config in configs.items():
        file = Path(config.output) / COST_FILE
        found = read_object(file) if file.is_file() else {}
        keys = ("videos", "done", "frames", "masks", "empty_masks")
        rows[name] = {key.replace("_", " "): str(found.get(key, "-")) for key in keys}
        rows[name] |= {"": "" if name in finished else "failed, see above", "output": config.output}
    print_rows(tables(), "predicted", "dataset", rows)


if __name__ == "__main__":
    Jobs("predict", PredictConfig, "output").start(predict_and_tell, print_predicted)
