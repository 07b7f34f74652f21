"""Training: time by procedure, and one step of a run against its plan."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from glus import distributed
from glus.config.hardware import nominal_tflops
from glus.train.measure import forget_peak, peak_memory, synchronize
from tools.qualification.outcome import GIB, Goal, Outcome, Sizes, Table, installed_version, key_table, yes_or_no

LEAST_MFU = 0.45
PLAN_TOLERANCE = 0.10


def training(sizes: Sizes, folder: Path) -> Outcome:
    """Steps of the training benchmark, and a step of the plan's sizes with the optimizer of a run."""
    from tools import benchmark_training

    device = distributed.use_device()
    words = ["--model", sizes.training_model, "--device", device.type, "--videos", str(sizes.videos)]
    words += ["--steps", str(sizes.steps), "--procedures", *sizes.procedures, *["--compile"] * sizes.is_compiled]
    report = benchmark_training.benchmark(benchmark_training.parse_arguments(words))
    gc.collect()  # or what is left would count as the next measurement's
    if device.type == "cuda":
        torch.cuda.empty_cache()
    step = measure_step(sizes, device)
    procedures = report["procedures"]
    losses = [loss for result in procedures.values() for loss in result["losses"].values()] + step["losses"]
    goals = [yes_or_no("losses are finite", bool(np.isfinite(losses).all()))]
    try:
        benchmark_training.check_losses(procedures, getattr(torch, report["dtype"]))
    except ValueError as error:
        goals.append(Goal("losses of the plain procedure", str(error), "equal but for rounding", False))
    if device.type == "cuda":
        goals += judge_training(report, step, nominal_tflops(torch.cuda.get_device_name(device)))
    return Outcome(goals, training_tables(report, step), report | {"step": step})


def judge_training(report: dict[str, Any], step: dict[str, Any], nominal: float | None) -> list[Goal]:
    """Goals of a GPU: utilisation (of the maker's figure if it is known), and memory as planned."""
    goals = []
    used = [result["mfu"] for result in report["procedures"].values() if "mfu" in result]
    if used:
        best = max(used) * report["peak_tflops"] / (nominal or report["peak_tflops"])
        goals.append(Goal("MFU of training", f"{best:.1%}", f">= {LEAST_MFU:.0%}", best >= LEAST_MFU))
    off = step["peak_bytes"] / step["planned_bytes"] - 1
    is_met = abs(off) <= PLAN_TOLERANCE
    goals.append(Goal("memory against plan", f"{off:+.1%}", f"+-{PLAN_TOLERANCE:.0%}", is_met))
    return goals


def training_tables(report: dict[str, Any], step: dict[str, Any]) -> list[Table]:
    """A column for each procedure, and the step of the plan's sizes."""
    procedures: dict[str, dict[str, Any]] = report["procedures"]
    rows = [
        ["seconds per micro-batch", *(f"{result['seconds']:.3f}" for result in procedures.values())],
        ["samples per second", *(f"{result['samples_per_second']:.2f}" for result in procedures.values())],
        ["MFU of the measured peak", *(f"{r['mfu']:.1%}" if "mfu" in r else "" for r in procedures.values())],
        ["peak memory, GiB", *(f"{result['peak_gib']:.2f}" for result in procedures.values())],
    ]
    parts = dict.fromkeys(part for result in procedures.values() for part in result["part_seconds"])
    for part in parts:
        rows.append([f"seconds: {part}", *(f"{r['part_seconds'].get(part, 0):.3f}" for r in procedures.values())])
    planned = step["planned_bytes"]
    one = {
        "optimizer": step["optimizer"],
        "seconds": f"{step['seconds']:.2f}",
        "losses": ", ".join(f"{loss:.3f}" for loss in step["losses"]),
        "peak memory": f"{step['peak_bytes'] / GIB:.2f} GiB",
        "planned": f"{planned / GIB:.2f} GiB" if planned else "not compared without a GPU",
    }
    title = f"Training, {report['settings']['videos']} videos, {report['peak_tflops']:.4g} TFLOP/s measured"
    return [Table(title, ("", *procedures), rows), key_table("A step of the plan's sizes, not compiled", one)]


def measure_step(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Two optimizer steps on a batch as ``plan`` assumes it: with DeepSpeed, or without if it is not installed."""
    from glus.config import ModelConfig, TrainConfig, TrainerConfig
    from glus.losses.objective import GlusObjective
    from glus.models.build import build_random
    from glus.train.plan import example_batch
    from tools import benchmark_inference

    is_checkpointing = sizes.procedures[0] == "ours, checkpointing"
    model: ModelConfig = benchmark_inference.model_config(sizes.training_model)
    trainer = TrainerConfig(
        steps=2, micro_batch_size=sizes.videos, global_batch_size=sizes.videos, warmup_steps=0, learning_rate=1e-5,
        gradient_checkpointing=is_checkpointing,
    )  # fmt: skip
    config = TrainConfig(model=model, trainer=trainer, output_dir="")
    forget_peak(device)
    glus = build_random(model, device).train()
    if is_checkpointing:
        glus.mllm.checkpoint_gradients()
    batch = example_batch(config, glus.mllm.tokens_per_frame, glus.mllm.clip.image_size, sizes.videos).to(device)
    objective = GlusObjective({"seg": 1.0, "bce": 2.0, "dice": 0.5}, seg_id=0)
    counts, has_engine = objective.counts([batch]), installed_version("deepspeed") is not None
    forward, take_step = (engine_step if has_engine else adamw_step)(glus, trainer)
    losses, seconds = [], 0.0
    forget_peak(device)
    for _ in range(trainer.steps):
        synchronize(device)
        before = time.perf_counter()
        total = objective(forward(batch), batch, counts, np.random.default_rng(0))["total"]
        take_step(total)
        synchronize(device)
        seconds = time.perf_counter() - before
        losses.append(float(total.detach()))
    if dist.is_initialized():
        dist.destroy_process_group()  # torch may abort a process that ends within its group
    return {
        "optimizer": "DeepSpeed, ZeRO-2" if has_engine else "AdamW of torch (DeepSpeed is not installed)",
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": peak_memory(device),
        "planned_bytes": planned_bytes(config, has_engine) if device.type == "cuda" else None,
    }


Step = tuple[Callable[[Any], Any], Callable[[torch.Tensor], None]]
"""A forward pass, and what a loss is followed by."""


def engine_step(glus: Any, trainer: Any) -> Step:
    """As a run of one process."""
    from glus.train.engine import Engine, init_distributed

    init_distributed(timeout_minutes=5)
    engine = Engine(glus, trainer, accumulation=1)
    engine.start_step(0)

    def take(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, take


def adamw_step(glus: Any, trainer: Any) -> Step:
    """Without DeepSpeed."""
    from glus.train.optim import build_adamw

    trained = [parameter for parameter in glus.parameters() if parameter.requires_grad]
    optimizer = build_adamw(trained, trainer.learning_rate, trainer.betas, trainer.weight_decay)

    def take(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return glus, take


def planned_bytes(config: Any, has_engine: bool) -> float:
    """What torch's allocator is to hold at most: the plan without the driver's share and what is lost between blocks.

    Without DeepSpeed, gradients and both moments are of the weights' own type.
    """
    from glus.config import HardwareConfig
    from glus.models.pretrained import build_glus
    from glus.train.plan import measure_sizes, memory_lines, total_bytes, trace_micro_batch

    with torch.device("meta"):
        counts = measure_sizes(build_glus(config.model, load_weights=False))
    trace = trace_micro_batch(config, 1, config.trainer.gradient_checkpointing)
    if not has_engine:
        each = 2 if config.model.precision.value == "bf16" else 4
        return each * (counts.total + 3 * counts.trained) + trace.peak * config.trainer.micro_batch_size
    lines = memory_lines(config, counts, HardwareConfig(num_gpus=1), trace)
    return total_bytes(line for line in lines if line.what not in ("CUDA, cuBLAS, NCCL", "fragmentation"))
