"""Prediction: speed against the plain procedure, and masks in bfloat16 and with the LLM in 4 bits."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from glus import distributed
from glus.config.hardware import nominal_tflops
from glus.train.measure import forget_peak, matmul_tflops, peak_memory
from tools.qualification.loading import answers, load_written
from tools.qualification.outcome import GIB, Absent, Goal, Outcome, Sizes, Table, key_table, need_gpu, yes_or_no
from tools.qualify import WEIGHTS_FOLDER

if TYPE_CHECKING:
    from glus.inference.predictor import VideoPredictor

LEAST_SPEED_UP = 10.0
LEAST_MEDIAN_IOU = 0.99


def prediction(sizes: Sizes, folder: Path) -> Outcome:
    """A generated video with some and with many sentences, against the plain procedure on its first frames."""
    from tools import benchmark_inference

    device = distributed.use_device()
    has_weights = sizes.model != "tiny" and (folder / WEIGHTS_FOLDER).is_dir()
    predictor = load_written(sizes, folder) if has_weights else benchmark_inference.build(sizes.model)
    dtype = next(predictor.glus.parameters()).dtype
    peak, nominal = matmul_tflops(device, dtype), None
    if device.type == "cuda":
        nominal = nominal_tflops(torch.cuda.get_device_name(device))
    cases, goals = {}, []
    for num_expressions, num_frames in sizes.predictions:
        video = benchmark_inference.BenchmarkVideo(num_frames, *sizes.frame_size)
        plain_frames = min(sizes.plain_frames, num_frames)
        measured = benchmark_inference.compare(predictor, video, num_expressions, 1, plain_frames)
        measured["mfu"] = measured["flops"] / measured["seconds"]["all"] / peak / 1e12
        measured["nominal_mfu"] = measured["mfu"] * peak / nominal if nominal else None
        name = f"{num_expressions} sentences x {num_frames} frames"
        cases[name] = measured
        goals.append(judge_prediction(name, measured, device))
    title = f"Prediction, {sizes.frame_size[1]} x {sizes.frame_size[0]}, {str(dtype).removeprefix('torch.')}"
    return Outcome(goals, [prediction_table(title, cases)], cases)


def judge_prediction(name: str, measured: dict[str, Any], device: torch.device) -> Goal:
    """A GPU is to be as much faster as is claimed; a CPU is to give the masks of the plain procedure (in float32)."""
    if device.type == "cpu":
        far = measured["pixels_that_differ_far_from_threshold"]
        return Goal(f"other pixels, {name}", str(far), "0", far == 0)
    ratio = measured["frames_per_second_ratio"]
    return Goal(f"times plain, {name}", f"{ratio:.1f}", f">= {LEAST_SPEED_UP:.0f}", ratio >= LEAST_SPEED_UP)


def prediction_table(title: str, cases: Mapping[str, dict[str, Any]]) -> Table:
    """A column for each video."""
    found = list(cases.values())
    whole = [case["seconds"]["all"] for case in found]
    rows = [
        ["seconds", *(f"{seconds:.2f}" for seconds in whole)],
        ["frames/s", *(f"{case['num_frames'] / s:.2f}" for case, s in zip(found, whole, strict=True))],
        ["sentence-frames/s", *(f"{case['frames_per_second']:.1f}" for case in found)],
        ["the same, plain procedure", *(f"{case['plain_frames_per_second']:.2f}" for case in found)],
        ["times the plain procedure", *(f"{case['frames_per_second_ratio']:.1f}" for case in found)],
        ["MFU of the measured peak", *(f"{case['mfu']:.1%}" for case in found)],
        ["MFU of the nominal peak", *(f"{c['nominal_mfu']:.1%}" if c["nominal_mfu"] else "" for c in found)],
        ["peak memory, GiB", *(f"{case['peak_memory_mb'] / 1024:.2f}" for case in found)],
    ]
    for stage in [name for name in found[0]["seconds"] if name != "all"]:
        rows.append([f"seconds: {stage}", *(f"{case['seconds'].get(stage, 0):.2f}" for case in found)])
    return Table(title, ("", *cases), rows)


def masks(sizes: Sizes, folder: Path) -> Outcome:
    """The shipped model's masks in both precisions."""
    from glus.config import Precision, SettingsConfig
    from glus.inference.predictor import load_predictor
    from tools.benchmark_inference import SHIPPED, BenchmarkVideo, compare

    distributed.use_device()
    torch.backends.cudnn.allow_tf32 = False  # float32 that is one, in this process alone
    precise, low = (
        load_predictor(SHIPPED, SettingsConfig(precision=precision))[0]
        for precision in (Precision.fp32, Precision.bf16)
    )
    values: dict[str, Any] = compare_masks(*(shape_masks(one, sizes.mask_videos) for one in (precise, low)))
    median = values["median IoU"]
    goals = [Goal("median IoU", f"{median:.4f}", f">= {LEAST_MEDIAN_IOU}", median >= LEAST_MEDIAN_IOU)]
    compared = compare(precise, BenchmarkVideo(16, 128, 128), 4, 2)
    far = values["pixels other than the plain procedure's"] = compared["pixels_that_differ_far_from_threshold"]
    goals.append(Goal("other pixels than the plain procedure's, float32", str(far), "0", far == 0))
    table = key_table("bfloat16 against float32", {name: f"{value:.4g}" for name, value in values.items()})
    return Outcome(goals, [table], values)


def shape_masks(predictor: VideoPredictor, num_videos: int) -> np.ndarray:
    """Masks (R, H, W) of all sentences in all frames of generated videos."""
    from tools.benchmark_inference import BenchmarkVideo

    found = []
    for seed in range(num_videos):
        video = BenchmarkVideo(16, 128, 128, seed=2000 + seed)
        texts = [sentence.text for sentence in video.scene.sentences]
        found += [result.masks_RHW for result in predictor.segment(video, texts)]
    return np.concatenate(found)


def compare_masks(ours_RHW: np.ndarray, reference_RHW: np.ndarray) -> dict[str, float]:
    """IoU per frame and sentence (1 where both are empty), and the pixels that differ."""
    union_R = (ours_RHW | reference_RHW).sum((1, 2))
    shared_R = (ours_RHW & reference_RHW).sum((1, 2))
    iou_R = np.where(union_R > 0, shared_R / np.maximum(union_R, 1), 1.0)
    return {
        "masks": len(iou_R),
        "median IoU": float(np.median(iou_R)),
        "mean IoU": float(iou_R.mean()),
        "least IoU": float(iou_R.min()),
        "share of masks below 0.9": float((iou_R < 0.9).mean()),
        "share of pixels that differ": float((ours_RHW != reference_RHW).mean()),
    }


def quantisation(sizes: Sizes, folder: Path) -> Outcome:
    """The LLM in 4 bits: the shipped model's masks, and what the full size takes."""
    need_gpu()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Absent("bitsandbytes is not installed (pip install 'glus[quantization]')")
    from glus.config import Precision, Quantization, SettingsConfig
    from glus.inference.predictor import load_predictor
    from tools.benchmark_inference import SHIPPED

    device = distributed.use_device()
    nf4 = SettingsConfig(precision=Precision.bf16, llm_quantization=Quantization.nf4)
    reference = shape_masks(load_predictor(SHIPPED, SettingsConfig(precision=Precision.bf16))[0], 2)
    values: dict[str, float] = compare_masks(shape_masks(load_predictor(SHIPPED, nf4)[0], 2), reference)
    goals = [Goal("masks", str(int(values["masks"])), "some", values["masks"] > 0)]
    if (folder / WEIGHTS_FOLDER).is_dir():
        torch.cuda.empty_cache()
        forget_peak(device)
        before = time.perf_counter()
        large = load_written(sizes, folder, nf4)
        values["full size: seconds"] = time.perf_counter() - before
        values["full size: GiB"] = torch.cuda.memory_allocated(device) / GIB
        values["full size: peak GiB"] = peak_memory(device) / GIB
        scores = answers(large, sizes)[1]
        goals.append(yes_or_no("full size answers", bool(np.isfinite(scores).all())))
    table = key_table("4 bits against bfloat16", {name: f"{value:.4g}" for name, value in values.items()})
    return Outcome(goals, [table], values)
