"""What a machine is, and how much of it the stages of ``tools/qualify.py`` ask."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from glus import distributed
from glus.config import GIB, nominal_tflops
from tools.benchmarks.measuring import (
    ROOT,
    Goal,
    Report,
    Table,
    goal_at_least,
    holds,
    key_table,
    matmul_tflops,
    timed,
)

PACKAGES = ("transformers", "peft", "deepspeed", "sam2", "bitsandbytes", "triton", "numpy")
LEAST_MATMUL_SHARE = 0.6
"""Of the maker's figure; a card that is slower is shared, too hot or throttled."""


def describe(device: torch.device) -> str:
    """The name by which a machine is known again."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def card_tflops(device: torch.device) -> float | None:
    """What the GPU's maker says of bfloat16; None where that is not known."""
    return nominal_tflops(describe(device)) if device.type == "cuda" else None


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    return next((found.version for found in importlib.metadata.distributions(name=package)), None)


class Absent(Exception):
    """The machine lacks what a stage needs; nothing is wrong."""


@dataclass(frozen=True)
class Sizes:
    """How much a machine is asked to do."""

    model: str = "tiny"
    """Of ``benchmark_inference``: ``tiny`` is the shipped model, ``glus_7b`` has random weights."""
    videos: int = 1
    """Of a training micro-batch."""
    procedures: tuple[str, ...] = ("ours", "ours, checkpointing", "plain")
    """Of ``benchmark_training``."""
    is_compiled: bool = False
    steps: int = 1
    """Timed training steps of each procedure."""
    predictions: tuple[tuple[int, int], ...] = ((8, 16), (20, 4))
    """Sentences and frames."""
    frame_size: tuple[int, int] = (128, 128)
    plain_frames: int = 4
    """Frames that the plain procedure is timed on, for one sentence."""
    mask_videos: int = 1
    """Generated videos on which bfloat16 is compared with float32."""

    @property
    def training_model(self) -> str:
        """Of ``benchmark_training``."""
        return "glus_tiny" if self.model == "tiny" else self.model


def choose_sizes(device: torch.device) -> Sizes:
    """What fits: the full size from 22 GiB on, more videos and less recomputing where there is more."""
    if device.type == "cpu":
        return Sizes()
    memory, predictions = torch.cuda.get_device_properties(device).total_memory / GIB, ((16, 75), (60, 16))
    if memory < 22:
        return Sizes(predictions=predictions, mask_videos=20)
    roomy, huge = memory > 70, memory > 100
    procedures = ("ours",) * roomy + ("ours, checkpointing",) + ("plain",) * huge
    return Sizes("glus_7b", 1 + roomy, procedures, roomy, 5, predictions, (720, 1280), 16, 20)


def need_gpu() -> None:
    """Raise ``Absent`` unless there is a GPU."""
    if not torch.cuda.is_available():
        raise Absent("there is no GPU")


def environment(sizes: Sizes, folder: Path) -> Report:
    """What the machine is, and the peaks that utilisation is measured against."""
    device = distributed.use_device()
    machine = {"device": describe(device), "system": platform.platform(), "threads": str(torch.get_num_threads())}
    peaks: dict[str, Any] = {"float32 TFLOP/s": matmul_tflops(device, torch.float32)}
    goals = []
    if device.type == "cuda":
        free, memory = torch.cuda.mem_get_info(device)
        machine["memory"] = f"{torch.cuda.device_count()} x {memory / GIB:.1f} GiB, {free / GIB:.1f} free"
        machine["driver"] = collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"
        machine["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        goals.append(holds("bfloat16 in hardware", torch.cuda.is_bf16_supported(including_emulation=False)))
        peaks |= {"bfloat16 TFLOP/s": matmul_tflops(device, torch.bfloat16), "nominal TFLOP/s": card_tflops(device)}
        if nominal := peaks["nominal TFLOP/s"]:
            share = peaks["bfloat16 TFLOP/s"] / nominal
            goals.append(goal_at_least("matrix products, of nominal", share, LEAST_MATMUL_SHARE, ".0%"))
    source = torch.zeros(GIB if device.type == "cuda" else GIB // 16, dtype=torch.uint8, device=device)
    copying = min(timed(source.clone, device)[1] for _ in range(10))
    peaks["memory GB/s"] = 2 * source.nbytes / copying / 1e9
    versions = {"torch": torch.__version__} | {name: installed_version(name) or "absent" for name in PACKAGES}
    values = {"machine": machine, "peaks": peaks, "versions": versions}
    return Report([key_table(name.title(), found) for name, found in values.items()], values, goals)


def gpu_tests(sizes: Sizes, folder: Path) -> Report:
    """``tests/gpu``."""
    need_gpu()
    if installed_version("pytest") is None:
        raise Absent("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs", "tests/gpu"]
    output = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout
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
