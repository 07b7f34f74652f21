"""Segment every expression of a split with a trained model.

    python scripts/predict.py dataset=shapes_valid weights=outputs/quickstart output_dir=outputs/quickstart/predictions
    torchrun --nproc_per_node=4 scripts/predict.py dataset=mevis_valid_u weights=... output_dir=...
    srun --ntasks=8 --gpus-per-node=8 python scripts/predict.py dataset=mevis_valid_u weights=... output_dir=...

Writes ``<output_dir>/<video>/<exp_id>/<frame>.png``; a folder is there only when it is complete, so a killed run is
continued by the same command, with any number of processes. Processes share the videos and need not meet.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from glus import distributed
from glus.config import PredictConfig, load_config
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.index import read_expressions
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.writer import PredictionWriter, prediction_identity
from glus.log import run_info, setup_logging
from glus.structures import Expression

Video = list[Expression]


@dataclass
class Summary:
    """What one process is responsible for, also where an earlier run has predicted it, and what this run did."""

    rank: int = 0
    world_size: int = 1
    videos: int = 0
    expressions: int = 0
    masks: int = 0
    """Pairs of expression and frame."""
    without_seg: int = 0
    """Masks where the model did not answer with [SEG]: empty unless ``force_seg``."""
    empty_masks: int = 0
    predicted_videos: int = 0
    """Those that were not finished by an earlier run."""
    predicted_frames: int = 0
    seconds: float = 0.0
    """Of prediction, without loading the model."""


def predict(config: PredictConfig) -> Summary:
    """This process's share of the split.

    Raises:
        FileNotFoundError: dataset or weights are not where the config says.
        ValueError: they are damaged, or ``output_dir`` holds something else.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    expressions = read_expressions(config.dataset)
    predictor, model = load_predictor(config.weights, config.inference)
    identity = prediction_identity(config.dataset, expressions, model.vocabulary.folder, model.config)
    writer = PredictionWriter(config.output_dir, identity, {"run": run_info(), "weights": config.weights})

    videos = [list(group) for _, group in groupby(expressions, key=lambda expression: expression.video)]
    share = distributed.shard(videos[: config.max_videos], rank, world_size)
    summary = Summary(rank, world_size, len(share), sum(len(video) for video in share))
    segment_share(predictor, writer, FrameStore(config.dataset), share, summary, show_progress=rank == 0)
    for answer in (answer for video in share for expression in video for answer in writer.answers(expression)):
        summary.masks += 1
        summary.without_seg += not answer["has_seg"]
        summary.empty_masks += answer["area"] == 0
    (writer.folder / f"summary_rank{rank}.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def segment_share(
    predictor: VideoPredictor,
    writer: PredictionWriter,
    frames: FrameStore,
    videos: list[Video],
    summary: Summary,
    show_progress: bool,
) -> None:
    """Predict what is not done, the expressions of a video together."""
    pending = [video for video in ([e for e in video if not writer.is_done(e)] for video in videos) if video]
    columns = (
        "{task.fields[done]}/{task.fields[videos]} videos,",
        MofNCompleteColumn(),
        "frames",
        BarColumn(),
        "{task.fields[speed]}",
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, disable=not show_progress) as progress:
        total = sum(len(video[0].frames) for video in pending)
        task = progress.add_task("", total=total, speed="", done=0, videos=len(pending))
        for video in pending:
            source = DatasetVideo(frames, video[0].video, video[0].frames)
            with ExitStack() as stack:
                folders = [stack.enter_context(writer.open(expression)) for expression in video]
                for result in predictor.segment(source, [expression.text for expression in video]):
                    answers = zip(result.rows, result.masks_RHW, result.scores_R, result.has_seg_R, strict=True)
                    for row, mask, score, has_seg in answers:
                        folders[row].write(source.names[result.frame], mask, score, has_seg)
                    summary.predicted_frames += 1
                    summary.seconds = time.perf_counter() - start
                    speed = f"{summary.predicted_frames / summary.seconds:.1f} frames/s"
                    progress.update(task, advance=1, speed=speed)
            summary.predicted_videos += 1
            progress.update(task, done=summary.predicted_videos)


@hydra.main(version_base="1.3", config_path="../configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``PredictConfig``."""
    setup_logging()
    try:
        config = load_config(PredictConfig, cfg)
        summary = predict(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    speed = summary.predicted_frames / max(summary.seconds, 1e-9)
    print(
        f"rank {summary.rank} of {summary.world_size}: {summary.masks} masks of {summary.expressions} "
        f"expressions in {summary.videos} videos ({summary.predicted_videos} predicted now, "
        f"{summary.seconds:.1f} s, {speed:.1f} frames/s); {summary.without_seg} without [SEG], "
        f"{summary.empty_masks} empty\n{Path(config.output_dir)}"
    )


if __name__ == "__main__":
    main()
