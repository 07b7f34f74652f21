"""What prediction costs: this project's predictor against the plain procedure, in one run.

    python tools/benchmark_inference.py --json benchmark.json            # the shipped model, 16 sentences x 60 frames
    python tools/benchmark_inference.py --size glus_7b --frames 75 --height 720 --width 1280    # random weights, GPU

The plain procedure is that of the released evaluation: one sentence and one frame at a time, all frames of the prompt
decoded and seen by CLIP again, the whole prompt read again with logits everywhere, one SAM2 encoding per sentence and
frame. Its cost is the same for every sentence, so it is timed on ``--plain-expressions`` of them and scaled up (of a
long video on ``--plain-frames`` alone); its masks are compared with ours. Procedures take turns for ``--rounds``
rounds, since a machine is not equally fast all the time; a ratio is the median over the rounds. Encodes, tokens, calls
and bytes are counted at the modules themselves.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

if not __package__:  # run as a program: what lies beside it is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus.config import Window, nominal_tflops
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.inference.predictor import VideoPredictor
from glus.types import FrameResult
from tools.benchmarks.measuring import (
    Report,
    case_table,
    command_line,
    count_operations,
    describe,
    finish,
    forget_peak,
    goal_at_most,
    in_turns,
    matmul_tflops,
    median_ratio,
    peak_memory,
)
from tools.benchmarks.plain import BenchmarkVideo, build_predictor, counted, segment_plainly, token_bound

NEAR_THRESHOLD = 1e-4
"""Mask logits closer to 0 than this may fall on either side when sums are taken in another order."""
EARLY_FRAME = 200
"""The frame whose peak memory the peak at the last frame is compared with."""


class PredictionRun(NamedTuple):
    """What a procedure gave, what it asked of the model, and the peak memory until then."""

    results: list[Any]
    counts: Counter[str]
    peak_bytes: int


def compare_procedures(
    predictor: VideoPredictor,
    video: BenchmarkVideo,
    num_expressions: int,
    plain_expressions: int,
    plain_frames: int | None = None,
    rounds: int = 1,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Segment a video by each procedure.

    Args:
        predictor: ours.
        video: all of it is segmented.
        num_expressions: sentences.
        plain_expressions: of these, how many the plain procedure is timed on.
        plain_frames: the first frames, on which it is timed; None: all.
        rounds: each procedure is timed so often.
        peak_tflops: of the device; None: that of a large matrix product, measured.

    Returns:
        What was measured, by name.
    """
    texts, plain_frames, device = video.texts(num_expressions), plain_frames or len(video), predictor.device
    few = texts[:plain_expressions]
    procedures = list_procedures(predictor, texts, few, plain_frames)
    for run in procedures.values():
        run(BenchmarkVideo(3, *video.read(0).shape[:2]))  # warms up
    with count_operations() as flops:
        list(predictor.segment(video, texts))
    predictor.seconds.clear()
    forget_peak(device)
    runs, seconds = in_turns({name: partial(run, video) for name, run in procedures.items()}, rounds, device)
    ours, scale = runs["ours"], len(video) * len(texts) / (plain_frames * len(few))
    median = {name: statistics.median(found) for name, found in seconds.items()}
    peak = peak_tflops or matmul_tflops(device, next(predictor.glus.parameters()).dtype)
    speed = flops.get_total_flops() / median["ours"] / 1e12
    return {
        "num_frames": len(video),
        "num_expressions": len(texts),
        "frames_per_second": len(video) * len(texts) / median["ours"],
        "plain_frames_per_second": plain_frames * len(few) / median["plain"],
        "frames_per_second_ratio": scale * median_ratio(seconds["plain"], seconds["ours"]),
        "clips_ratio": median_ratio(seconds["ours"], seconds["clips"]),
        "llm_tokens_bound": token_bound(predictor, texts, len(video)),
        **count_differences(ours.results[:plain_frames], runs["plain"].results),
        "clip_encodes": ours.counts["CLIP images"],
        "sam2_encodes": ours.counts["SAM2 images"],
        "llm_tokens": ours.counts["LLM tokens"],
        "counts": dict(ours.counts),
        "clips_counts": dict(runs["clips"].counts),
        "plain_counts": {name: round(count * scale) for name, count in runs["plain"].counts.items()},
        "seconds": {"all": median["ours"]} | {stage: spent / rounds for stage, spent in predictor.seconds.items()},
        "peak_memory_mb": ours.peak_bytes / 2**20,
        "flops": flops.get_total_flops(),
        "mfu": speed / peak,
    } | ({"nominal_mfu": speed / nominal} if (nominal := nominal_tflops(describe(device))) else {})


def list_procedures(
    predictor: VideoPredictor, texts: Sequence[str], few: Sequence[str], plain_frames: int
) -> dict[str, Callable[[BenchmarkVideo], PredictionRun]]:
    """Ours, ours with windows of clips, and the plain procedure on ``few`` of the texts."""
    clips = with_window(predictor, Window.clips)
    segment: dict[str, Callable[[BenchmarkVideo], list[Any]]] = {
        "ours": lambda video: list(predictor.segment(video, texts)),
        "clips": lambda video: list(clips.segment(video, texts)),
        "plain": lambda video: [list(islice(segment_plainly(predictor, video, text), plain_frames)) for text in few],
    }

    def run(name: str, video: BenchmarkVideo) -> PredictionRun:
        with counted(predictor.glus) as counts:
            return PredictionRun(segment[name](video), counts, peak_memory(predictor.device))

    return {name: partial(run, name) for name in segment}


def with_window(predictor: VideoPredictor, window: Window) -> VideoPredictor:
    """The same predictor with other windows."""
    inference = replace(predictor.inference, window=window)
    return VideoPredictor(predictor.glus, predictor.chat, predictor.frames, inference)


def count_differences(
    ours: Sequence[FrameResult], plain: Sequence[Sequence[tuple[torch.Tensor, bool]]]
) -> dict[str, int]:
    """Pixels where our masks differ from the plain ones, and those of them that are not near the threshold; of the
    sentences that the plain procedure answered, whose frames alone ``ours`` are."""
    logits_ETHW = torch.stack([torch.stack([logits for logits, _ in answered]) for answered in plain])
    ours_ETHW = torch.from_numpy(np.stack([result.masks_RHW[: len(plain)] for result in ours], axis=1))
    differs = ours_ETHW != (logits_ETHW > 0).cpu()
    far = differs & (logits_ETHW.abs() >= NEAR_THRESHOLD).cpu()
    return {"pixels_that_differ": int(differs.sum()), "pixels_that_differ_far_from_threshold": int(far.sum())}


def segment_scenes(predictor: VideoPredictor, seeds: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks and targets (T, H, W) of all sentences of newly generated scenes of 16 frames."""
    found = []
    for seed in seeds:
        video = BenchmarkVideo(16, 128, 128, seed)
        sentences = video.scene.sentences
        results = list(predictor.segment(video, [sentence.text for sentence in sentences]))
        for row, sentence in enumerate(sentences):
            target_THW = np.any(video.scene.masks_OTHW[list(sentence.object_ids)], axis=0)
            found.append((np.stack([result.masks_RHW[row] for result in results]), target_THW))
    return found


def score_scenes(predictor: VideoPredictor, num_videos: int) -> float:
    """J&F in percent over all sentences."""
    pairs = segment_scenes(predictor, range(1000, 1000 + num_videos))
    return 50 * float(np.mean([region_similarity(*pair).mean() + boundary_accuracy(*pair).mean() for pair in pairs]))


def shape_masks(predictor: VideoPredictor, num_videos: int) -> np.ndarray:
    """Masks (R, H, W) of all sentences in all frames of generated videos."""
    return np.concatenate([found for found, _ in segment_scenes(predictor, range(2000, 2000 + num_videos))])


def compare_masks(ours_RHW: np.ndarray, reference_RHW: np.ndarray) -> dict[str, float]:
    """IoU per frame and sentence (1 where both are empty), and the pixels that differ."""
    iou_R = region_similarity(ours_RHW, reference_RHW)
    return {
        "masks": len(iou_R),
        "median IoU": float(np.median(iou_R)),
        "mean IoU": float(iou_R.mean()),
        "least IoU": float(iou_R.min()),
        "share of masks below 0.9": float((iou_R < 0.9).mean()),
        "share of pixels that differ": float((ours_RHW != reference_RHW).mean()),
    }


def peaks(size: str, num_frames: int, height: int, width: int) -> tuple[int, int]:
    """Peak memory in bytes after ``EARLY_FRAME`` frames and at the end, in a process that does nothing else."""
    predictor = build_predictor(size)
    video = BenchmarkVideo(num_frames, height, width)
    forget_peak(predictor.device)
    early = 0
    for result in predictor.segment(video, video.texts(2)):
        if result.frame == EARLY_FRAME:
            early = peak_memory(predictor.device)
    return early, peak_memory(predictor.device)


def measure(options: argparse.Namespace) -> Report:
    """Everything that is reported."""
    predictor, place = build_predictor(options.size), (options.height, options.width)
    sizes = (options.expressions, options.plain_expressions, options.plain_frames, options.rounds, options.peak_tflops)
    values = {"size": options.size, "device": str(predictor.device)}
    values |= compare_procedures(predictor, BenchmarkVideo(options.frames, *place), *sizes)
    if options.size == "tiny":
        values["jf_sliding"] = score_scenes(predictor, options.scenes)
        values["jf_clips"] = score_scenes(with_window(predictor, Window.clips), options.scenes)
    if options.memory_frames > EARLY_FRAME:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its own process, whose peak is of this alone
            early, late = pool.apply(peaks, (options.size, options.memory_frames, *place))
        values |= {"memory_frames": options.memory_frames, "memory_growth": late / early}
    far = values["pixels_that_differ_far_from_threshold"]
    tables = [case_table("Prediction", {case_name(values): values})]
    return Report(tables, values, [goal_at_most("masks differ from the plain procedure's in pixels", far, 0)])


def case_name(measured: Mapping[str, Any]) -> str:
    """What was segmented."""
    return f"{measured['num_expressions']} sentences x {measured['num_frames']} frames"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line(__doc__)
    parser.add_argument("--size", choices=("tiny", "glus_7b"), default="tiny", help="tiny: the shipped model")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--expressions", type=int, default=16)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--plain-expressions", type=int, default=2, help="those that the plain procedure is timed on")
    parser.add_argument("--plain-frames", type=int, help="frames that it is timed on; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="each procedure is timed so often, in turns")
    parser.add_argument("--scenes", type=int, default=10, help="generated videos for J&F (size tiny)")
    parser.add_argument("--memory-frames", type=int, default=2000, help=f"long video; to {EARLY_FRAME}: not measured")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: a large matrix product, measured")
    options = parser.parse_args(arguments)
    finish(measure(options), options.json)


if __name__ == "__main__":
    main()
