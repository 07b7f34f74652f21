"""The stages of ``tools/qualify.py``, each run in a process of its own, whose memory and whose crash are its own.

    python -m tools.benchmarks.stages training outputs/qualify

A stage gives a ``Report``, or raises: ``Absent`` where the machine lacks what it needs, anything else where it fails.
What a stage alone needs it imports itself, so that a library that is missing fails that stage only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from glus import distributed
from glus.config import (
    GIB,
    HardwareConfig,
    ModelFolderConfig,
    Precision,
    Quantization,
    SettingsConfig,
    TrainConfig,
    TrainerConfig,
    nominal_tflops,
)
from glus.files import PROJECT, write_text
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.losses.objective import GlusObjective
from glus.models.build import build_random
from glus.models.pretrained import build_glus, save_model
from glus.tokens import Vocabulary
from glus.train.plan import example_batch, measure_sizes, memory_lines, total_bytes, trace_micro_batch
from tools.benchmarks import plain
from tools.benchmarks.measuring import (
    Goal,
    Report,
    Sizes,
    Table,
    case_table,
    choose_sizes,
    describe,
    environment,
    forget_peak,
    goal_at_least,
    goal_at_most,
    holds,
    host_peak,
    installed_version,
    key_table,
    peak_memory,
    timed,
)
from tools.benchmarks.plain import SHIPPED_MODEL, BenchmarkVideo

WEIGHTS_FOLDER = "random_weights"
"""What the stages pass on; deleted when none is to be done again."""
ANSWERS_FILE = "answers.npz"
LEAST_MFU, PLAN_TOLERANCE = 0.45, 0.10
LEAST_SPEED_UP, LEAST_MEDIAN_IOU = 10.0, 0.99
MOST_DEVICE_LOAD, MOST_HOST_LOAD = 1.15, 4.0
"""Peaks of a GPU's process while it loads: times the weights, and GiB of the host."""
MOST_CHANGED = 1e-3
"""Share of the pixels, and of a score, that other kernels may change."""


class Absent(Exception):
    """The machine lacks what a stage needs; nothing is wrong."""


def need_gpu() -> None:
    """Raise ``Absent`` unless there is a GPU."""
    if not torch.cuda.is_available():
        raise Absent("there is no GPU")


def gpu_tests(sizes: Sizes, folder: Path) -> Report:
    """``tests/gpu``."""
    need_gpu()
    if installed_version("pytest") is None:
        raise Absent("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs", "tests/gpu"]
    output = subprocess.run(command, cwd=PROJECT, check=False, capture_output=True, text=True).stdout
    print(output)
    return judge_tests(output)


def judge_tests(output: str) -> Report:
    """Whether, by what pytest says at its end, all tests passed or were skipped, and one at least passed."""
    *lines, last = output.strip().splitlines() or [""]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped|failed|error)", last)}
    other = [line for line in lines if line.startswith(("FAILED ", "ERROR ", "SKIPPED "))]
    is_met = "passed" in counts and not {"failed", "error"} & counts.keys()
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    tables = [Table("Not passed", ("test",), [(line,) for line in other])] * bool(other)
    return Report(tables, {"tests": counts}, [Goal("tests/gpu", found, "all passed or skipped", is_met)])


# -------------------------------------------------------------------------------------------------- loading


def full_size(sizes: Sizes, folder: Path) -> Report:
    """The network with random weights made on the device: sane numbers, an answer to each question; written to disk."""
    device = distributed.use_device()
    predictor, seconds = timed(lambda: plain.build_predictor(sizes.model), device)
    parameters = list(predictor.glus.parameters())
    num_bytes = sum(parameter.nbytes for parameter in parameters)
    is_finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
    masks, scores = answers(predictor, sizes)
    np.savez_compressed(folder / ANSWERS_FILE, masks=masks, scores=scores)
    values = {
        "parameters": f"{sum(parameter.numel() for parameter in parameters):,}",
        "weights": f"{num_bytes / GIB:.2f} GiB",
        "made in": f"{seconds:.1f} s",
        "written": _write_weights(predictor, sizes, folder, num_bytes),
    }
    goals = [
        holds("weights are finite", is_finite),
        holds("every sentence is answered in every frame", bool(np.isfinite(scores).all() and scores.min() >= 0)),
    ]
    return Report([key_table("Full size" if sizes.model != "tiny" else "Shipped model", values)], values, goals)


def answers(predictor: VideoPredictor, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Masks (T, E, H, W) and scores (T, E) of two sentences in four frames."""
    video = BenchmarkVideo(4, *sizes.frame_size)
    results = list(predictor.segment(video, video.texts(2)))
    return np.stack([result.masks_RHW for result in results]), np.stack([result.scores_R for result in results])


def _write_weights(predictor: VideoPredictor, sizes: Sizes, folder: Path, num_bytes: int) -> str:
    """Write a model folder to load, if the disk has room; what was done, in words."""
    if sizes.model == "tiny":
        return "no: it lies in assets/"
    free = shutil.disk_usage(folder).free
    if free < 1.1 * num_bytes + GIB:
        return f"no: {free / GIB:.0f} GiB free"
    shutil.rmtree(folder / WEIGHTS_FOLDER, ignore_errors=True)
    started = time.perf_counter()
    config = ModelFolderConfig(plain.model_config(sizes.model), predictor.frames, predictor.inference)
    save_model(folder / WEIGHTS_FOLDER, predictor.glus.state_dict(), config, Vocabulary(SHIPPED_MODEL), metadata={})
    return f"in {time.perf_counter() - started:.1f} s"


def loading(sizes: Sizes, folder: Path) -> Report:
    """A model folder into a fresh process: seconds, peaks, and the same answers as before it was written."""
    device = distributed.use_device()
    if not (folder / ANSWERS_FILE).is_file():
        raise Absent("the stage full_size left no answers to compare with")
    forget_peak(device)
    with host_peak() as host:
        predictor, seconds = timed(lambda: load_written(sizes, folder), device)
    num_bytes = sum(parameter.nbytes for parameter in predictor.glus.parameters())
    peak = peak_memory(device)
    values = {
        "seconds": f"{seconds:.1f}",
        "GB/s": f"{num_bytes / seconds / 1e9:.2f}",
        "weights": f"{num_bytes / GIB:.2f} GiB",
        "peak, GPU" if device.type == "cuda" else "peak, resident": f"{peak / GIB:.2f} GiB",
        "peak, host, without mapped files": f"{max(host) / GIB:.2f} GiB",
    }
    goals = compare_answers(*answers(predictor, sizes), folder / ANSWERS_FILE)
    if device.type == "cuda" and sizes.model != "tiny":
        goals.append(goal_at_most("GPU's peak, times the weights", peak / num_bytes, MOST_DEVICE_LOAD, ".2f"))
        goals.append(goal_at_most("host's peak, GiB", max(host) / GIB, MOST_HOST_LOAD, ".1f"))
    return Report([key_table("Loading", values)], values, goals)


def compare_answers(masks: np.ndarray, scores: np.ndarray, file: Path) -> list[Goal]:
    """Whether ``answers`` are those that ``full_size`` wrote."""
    before = np.load(file)
    score = np.abs(scores - before["scores"]) / np.maximum(np.maximum(scores, before["scores"]), 1e-30)
    return [
        goal_at_most("pixels that changed", float((masks != before["masks"]).mean()), MOST_CHANGED, ".2%"),
        goal_at_most("largest change of a score", float(score.max()), MOST_CHANGED, ".2%"),
    ]


def load_written(sizes: Sizes, folder: Path, settings: SettingsConfig | None = None) -> VideoPredictor:
    """What ``full_size`` built, from disk; ``settings`` override the model folder's.

    Raises:
        Absent: the disk had no room for it.
    """
    if sizes.model == "tiny":
        return load_predictor(SHIPPED_MODEL, settings)[0]
    if not (folder / WEIGHTS_FOLDER).is_dir():
        raise Absent("no room on the disk for the full size's weights (without full_size.json they are written again)")
    as_made = SettingsConfig(precision=plain.model_config(sizes.model).precision)  # on a CPU too
    loaded = load_predictor(folder / WEIGHTS_FOLDER, settings or as_made)[0]
    tokenizer = plain.stand_in_tokenizer(loaded.chat.tokens_per_frame)
    return VideoPredictor(loaded.glus, tokenizer, loaded.frames, loaded.inference)


# ------------------------------------------------------------------------------------------------- training


def training(sizes: Sizes, folder: Path) -> Report:
    """Steps of the training benchmark."""
    from tools import benchmark_training

    device = distributed.use_device()
    words = ["--model", sizes.training_model, "--device", device.type, "--videos", str(sizes.videos)]
    words += ["--steps", str(sizes.steps), "--procedures", *sizes.procedures, *["--compile"] * sizes.is_compiled]
    report = benchmark_training.benchmark(benchmark_training.parse_arguments(words))
    losses = [loss for result in report.values["procedures"].values() for loss in result["losses"].values()]
    goals = [holds("losses are finite", bool(np.isfinite(losses).all()))]
    goals += [goal for goal in report.goals if not goal.is_met]
    if device.type == "cuda":
        goals += judge_training(report.values, nominal_tflops(describe(device)))
    return Report(report.tables, report.values, goals)


def judge_training(values: Mapping[str, Any], nominal: float | None) -> list[Goal]:
    """Utilisation of a GPU, of the maker's figure if it is known; none where every procedure recomputes."""
    used = [result["mfu"] for result in values["procedures"].values() if "mfu" in result]
    peak = values["peak_tflops"]
    return [goal_at_least("MFU of training", max(used) * peak / (nominal or peak), LEAST_MFU, ".1%")] if used else []


def plan(sizes: Sizes, folder: Path) -> Report:
    """Two optimizer steps of a run of one process, with DeepSpeed, on a batch as ``tools/plan.py`` assumes it."""
    from glus.train.engine import Engine, init_distributed

    device, videos, is_checkpointing = distributed.use_device(), sizes.videos, "checkpointing" in sizes.procedures[0]
    trainer = TrainerConfig(2, micro_batch_size=videos, global_batch_size=videos, warmup_steps=0, learning_rate=1e-5)
    trainer.gradient_checkpointing = is_checkpointing
    config = TrainConfig(model=plain.model_config(sizes.training_model), trainer=trainer, output="")
    forget_peak(device)
    glus = build_random(config.model, device).train()
    glus.mllm.decoder.checkpoint_gradients(is_checkpointing)
    batch = example_batch(config, glus.mllm, videos).to(device)
    objective = GlusObjective({"seg": 1.0, "bce": 2.0, "dice": 0.5}, seg_id=0)
    init_distributed(timeout_minutes=5)
    engine = Engine(glus, trainer, accumulation=1)
    engine.start_step(0)

    def step() -> float:
        total = objective(engine(batch), batch, objective.counts([batch]), np.random.default_rng(0))["total"]
        engine.backward(total)
        engine.step()
        return float(total.detach())

    losses, seconds = zip(*(timed(step, device) for _ in range(trainer.steps)), strict=True)
    dist.destroy_process_group()  # torch may abort a process that ends within its group
    values = {"losses": [*losses], "seconds": seconds[-1], "peak_bytes": peak_memory(device)}
    values["planned_bytes"] = planned_bytes(config)
    goals = [holds("losses are finite and fall", losses[1] < losses[0])]
    goals += [judge_plan(values)] if device.type == "cuda" else []
    return Report([key_table("A step of the plan's sizes, not compiled", values)], values, goals)


def judge_plan(values: Mapping[str, Any]) -> Goal:
    """A GPU's peak is to be near the plan's."""
    off = values["peak_bytes"] / values["planned_bytes"] - 1
    return Goal("memory against plan", f"{off:+.1%}", f"+-{PLAN_TOLERANCE:.0%}", abs(off) <= PLAN_TOLERANCE)


def planned_bytes(config: TrainConfig) -> float:
    """What torch's allocator is to hold: the plan without the driver's share and what is lost between blocks."""
    with torch.device("meta"):
        counts = measure_sizes(build_glus(config.model, load_weights=False))
    trace = trace_micro_batch(config, 1, config.trainer.gradient_checkpointing)
    lines = memory_lines(config, counts, HardwareConfig(num_gpus=1), trace)
    return total_bytes(line for line in lines if line.what not in ("CUDA, cuBLAS, NCCL", "fragmentation"))


# ----------------------------------------------------------------------------------------------- prediction


def prediction(sizes: Sizes, folder: Path) -> Report:
    """A generated video with some and with many sentences, against the plain procedure on its first frames."""
    from tools.benchmark_inference import case_name, compare_procedures

    device = distributed.use_device()
    has_weights = sizes.model != "tiny" and (folder / WEIGHTS_FOLDER).is_dir()
    predictor = load_written(sizes, folder) if has_weights else plain.build_predictor(sizes.model)
    cases = {}
    for num_expressions, num_frames in sizes.predictions:
        video = BenchmarkVideo(num_frames, *sizes.frame_size)
        measured = compare_procedures(predictor, video, num_expressions, 1, min(sizes.plain_frames, num_frames))
        cases[case_name(measured)] = measured
    goals = [judge_prediction(name, measured, device) for name, measured in cases.items()]
    return Report([case_table("Prediction", cases)], cases, goals)


def judge_prediction(name: str, measured: dict[str, Any], device: torch.device) -> Goal:
    """A GPU is to be as much faster as is claimed; a CPU is to give the masks of the plain procedure (in float32)."""
    if device.type == "cpu":
        return goal_at_most(f"other pixels, {name}", measured["pixels_that_differ_far_from_threshold"], 0)
    return goal_at_least(f"times plain, {name}", measured["frames_per_second_ratio"], LEAST_SPEED_UP, ".1f")


def masks(sizes: Sizes, folder: Path) -> Report:
    """The shipped model's masks in both precisions."""
    from tools.benchmark_inference import compare_masks, compare_procedures, shape_masks

    torch.backends.cudnn.allow_tf32 = False  # float32 that is one, in this process alone
    precise, low = (load_predictor(SHIPPED_MODEL, SettingsConfig(one))[0] for one in (Precision.fp32, Precision.bf16))
    values = compare_masks(shape_masks(precise, sizes.mask_videos), shape_masks(low, sizes.mask_videos))
    far = compare_procedures(precise, BenchmarkVideo(16, 128, 128), 4, 2)["pixels_that_differ_far_from_threshold"]
    goals = [
        goal_at_least("median IoU", values["median IoU"], LEAST_MEDIAN_IOU, ".4f"),
        goal_at_most("other pixels than the plain procedure's, float32", far, 0),
    ]
    return Report([key_table("bfloat16 against float32", values)], values, goals)


def quantisation(sizes: Sizes, folder: Path) -> Report:
    """The LLM in 4 bits: the shipped model's masks, and what the full size takes."""
    need_gpu()
    if installed_version("bitsandbytes") is None:
        raise Absent("bitsandbytes is not installed (pip install 'glus[quantization]')")
    from tools.benchmark_inference import compare_masks, shape_masks

    device, precision = distributed.use_device(), Precision.bf16
    nf4 = SettingsConfig(precision, llm_quantization=Quantization.nf4)
    few, many = (load_predictor(SHIPPED_MODEL, settings)[0] for settings in (nf4, SettingsConfig(precision)))
    values = compare_masks(shape_masks(few, 2), shape_masks(many, 2))
    goals = [goal_at_least("masks", values["masks"], 1)]
    if (folder / WEIGHTS_FOLDER).is_dir():
        forget_peak(device)
        large, values["full size: seconds"] = timed(lambda: load_written(sizes, folder, nf4), device)
        values["full size: GiB"] = torch.cuda.memory_allocated(device) / GIB
        values["full size: peak GiB"] = peak_memory(device) / GIB
        goals.append(holds("full size answers", bool(np.isfinite(answers(large, sizes)[1]).all())))
    return Report([key_table("4 bits against bfloat16", values)], values, goals)


# -------------------------------------------------------------------------------------------------- running


MACHINE_TESTS: dict[str, Callable[[Sizes, Path], Report]] = {
    stage.__name__: stage
    for stage in (environment, gpu_tests, full_size, loading, training, plan, prediction, masks, quantisation)
}
"""In their order."""


def code_digest() -> str:
    """SHA-256 of the sources and settings that decide what is measured."""
    patterns = ("glus/**/*.py", "tools/**/*.py", "configs/**/*.yaml")
    files = (path for pattern in patterns for path in sorted(PROJECT.glob(pattern)))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def run_stage(name: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Run a stage and write ``<folder>/<name>.json``.

    Returns:
        What was written.
    """
    record: dict[str, Any] = {"stage": name, "machine": describe(distributed.device()), "sizes": asdict(sizes)}
    record |= {"torch": torch.__version__, "transformers": installed_version("transformers"), "code": code_digest()}
    started = time.perf_counter()
    try:
        report = MACHINE_TESTS[name](sizes, folder)
    except Absent as reason:
        record |= {"verdict": "absent", "reason": str(reason)}
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("glus", "tools", "tests"):
            raise
        record |= {"verdict": "absent", "reason": f"{error.name} is not installed"}
    else:
        record |= {"verdict": "PASS" if all(goal.is_met for goal in report.goals) else "FAIL", **asdict(report)}
    record["seconds"] = time.perf_counter() - started
    write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    return record


if __name__ == "__main__":
    run_stage(sys.argv[1], Path(sys.argv[2]), choose_sizes(distributed.device()))
