"""What benchmarks and the qualification share: what a machine is, how it is measured, what is judged and shown."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import collect_env
from torch.utils.flop_counter import FlopCounterMode

from glus import distributed
from glus.config import GIB, nominal_tflops
from glus.files import write_text
from glus.train.plan import attention_counts

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the matrices whose product stands for the device's peak."""
PACKAGES = ("transformers", "peft", "deepspeed", "sam2", "bitsandbytes", "triton", "numpy")
LEAST_MATMUL_SHARE = 0.6
"""Of the maker's figure; a card that is slower is shared, too hot or throttled."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Goal:
    """One thing that must hold."""

    name: str
    found: str
    expected: str
    is_met: bool


def goal_at_least(name: str, found: float, bound: float, form: str = "") -> Goal:
    """A goal that NaN does not meet."""
    return Goal(name, format(found, form), f">= {bound:{form}}", bool(found >= bound))


def goal_at_most(name: str, found: float, bound: float, form: str = "") -> Goal:
    """A goal that NaN does not meet."""
    return Goal(name, format(found, form), f"<= {bound:{form}}", bool(found <= bound))


def holds(name: str, is_met: bool) -> Goal:
    """A goal without a number."""
    return Goal(name, "yes" if is_met else "no", "yes", bool(is_met))


@dataclass(frozen=True)
class Table:
    """Its first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Aligned, so that it can be read as it is, too."""
        cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        head, *body = [
            f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells
        ]
        rule = f"| {' | '.join('-' * width for width in widths)} |"
        return "\n".join([*([f"## {self.title}", ""] if self.title else []), head, rule, *body])


def case_table(title: str, cases: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for each case, a row for each number and word that was found in any of them, by its name in the JSON."""
    columns = [dict(_entries(found)) for found in cases.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    return Table(title, ("", *cases), [(name, *(column.get(name, "") for column in columns)) for name in names])


def _entries(found: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{within}{name}: ")
        elif not isinstance(value, list):
            yield f"{within}{name}", format(value, {int: ",", float: ".4g"}.get(type(value), ""))


def key_table(title: str, found: Mapping[str, Any]) -> Table:
    """A row for each number and word."""
    return case_table(title, {"value": found})


@dataclass(frozen=True)
class Report:
    """What was measured."""

    tables: list[Table]
    values: dict[str, Any]
    """All of it, as data."""
    goals: list[Goal] = field(default_factory=list)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark understands."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    return parser


def read_size(text: str) -> tuple[int, int]:
    """``720x1280`` -> height and width."""
    height, width = (int(side) for side in text.split("x"))
    return height, width


def finish(report: Report, file: Path | None) -> None:
    """Show what a benchmark found, and end the program with an error if a goal is not met."""
    print("\n\n".join(table.markdown() for table in report.tables))
    if file:
        write_text(file, json.dumps(report.values, indent=2) + "\n")
    missed = [f"{goal.name}: {goal.found}, expected {goal.expected}" for goal in report.goals if not goal.is_met]
    if missed:
        sys.exit(f"error: {'; '.join(missed)}")


# ------------------------------------------------------------------------------------------------ measuring


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call gives, and its seconds until the device is done."""
    synchronize = torch.get_device_module(device).synchronize  # does nothing on a CPU
    synchronize()
    started = time.perf_counter()
    result = run()
    synchronize()
    return result, time.perf_counter() - started


def in_turns(
    procedures: Mapping[str, Callable[[], Result]], rounds: int, device: torch.device
) -> tuple[dict[str, Result], dict[str, list[float]]]:
    """Every procedure once per round, since a machine is not equally fast all the time.

    Returns:
        What each gave in the first round, and its seconds in every round.
    """
    results: dict[str, Result] = {}
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    for _ in range(rounds):
        for name, run in procedures.items():
            result, spent = timed(run, device)
            results.setdefault(name, result)
            seconds[name].append(spent)
    return results, seconds


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long as another a procedure took, in the median of the rounds."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def peak_memory(device: torch.device) -> int:
    """Bytes since ``forget_peak``: of the GPU's allocations, or resident in this process (Linux).

    Not ``getrusage``'s: that one a process inherits from the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory("VmHWM")


def process_memory(kind: str) -> int:
    """Bytes of this process by a line of Linux' status: VmHWM (peak), VmRSS (resident), RssAnon (without files)."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


@contextmanager
def host_peak(interval: float = 0.02) -> Iterator[list[int]]:
    """The memory of this process that no file backs, in bytes, looked at ever so often."""
    seen, is_over = [process_memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not is_over.wait(interval):
            seen.append(process_memory("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def forget_peak(device: torch.device) -> None:
    """Count the peak from now on, so that importing, loading and other measurements do not hide it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of ten products of two large matrices, in 10^12 operations a second."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device)[1] for _ in range(10)) / 1e12


def count_operations() -> FlopCounterMode:
    """A context in which torch counts operations, those of attention as ``attention_counts`` does."""
    return FlopCounterMode(display=False, custom_mapping=attention_counts())


# ------------------------------------------------------------------------------------------------- machines


def describe(device: torch.device) -> str:
    """The name by which a machine is known again."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    return next((found.version for found in importlib.metadata.distributions(name=package)), None)


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
        nominal = nominal_tflops(machine["device"])
        peaks |= {"bfloat16 TFLOP/s": matmul_tflops(device, torch.bfloat16), "nominal TFLOP/s": nominal}
        if nominal:
            share = peaks["bfloat16 TFLOP/s"] / nominal
            goals.append(goal_at_least("matrix products, of nominal", share, LEAST_MATMUL_SHARE, ".0%"))
    source = torch.zeros(GIB if device.type == "cuda" else GIB // 16, dtype=torch.uint8, device=device)
    copying = min(timed(source.clone, device)[1] for _ in range(10))
    peaks["memory GB/s"] = 2 * source.nbytes / copying / 1e9
    versions = {"torch": torch.__version__} | {name: installed_version(name) or "absent" for name in PACKAGES}
    values = {"machine": machine, "peaks": peaks, "versions": versions}
    return Report([key_table(name.title(), found) for name, found in values.items()], values, goals)
