"""What a training run costs on a machine, and how to fit it there. Needs no GPU, no data and no weights.

    python tools/plan.py experiment=glus_s
    python tools/plan.py experiment=glus_s hardware=gpu1_24gb
    python tools/plan.py experiment=glus_a hardware=gpu8 hardware.gpu_memory_gb=40 trainer.zero_stage=3

Prints parameters by part, memory of one GPU by part with the formula of each line, operations of a step, and the
settings to use. The network is built and run on the meta device, so that its own code is what is counted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Column, Table

from glus.config import GIB, HardwareConfig, TrainConfig
from glus.config.jobs import Jobs
from glus.console import tables
from glus.models.pretrained import build_glus
from glus.train.plan import (
    USABLE,
    Line,
    Trace,
    count_parameters,
    host_lines,
    measure_sizes,
    memory_lines,
    prediction_bytes,
    recommend,
    total_bytes,
    trace_micro_batch,
)

ASSUMED_UTILISATION = 0.4
"""Of a GPU's peak, for the estimate of time."""


def show_table(
    console: Console, title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]], total: tuple[str, ...]
) -> None:
    """Print rows and their sum; a column whose name ends in ``>`` is aligned to the right."""
    table = Table(*(Column(c.rstrip(">"), justify="right" if c[-1] == ">" else "left") for c in columns), title=title)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    console.print(table)


def show_memory(console: Console, title: str, lines: list[Line], available_gb: float) -> None:
    """Print lines and their sum beside what there is."""
    rows = [(line.what, f"{line.bytes / GIB:.2f}", line.formula) for line in lines]
    total = ("sum", f"{total_bytes(lines) / GIB:.2f}", f"of {available_gb:g}")
    show_table(console, title, ("what", "GiB>", "how"), rows, total)


def show_operations(console: Console, config: TrainConfig, hardware: HardwareConfig, trace: Trace) -> None:
    """Print operations of an optimizer step and the time they take."""
    videos, total = config.trainer.global_batch_size, sum(trace.flops.values())
    rows = [(part, f"{videos * flops / 1e12:,.1f}", f"{flops / total:.1%}") for part, flops in trace.flops.items()]
    title = f"operations of one step of {videos} videos"
    show_table(console, title, ("part", "TFLOP>", "share>"), rows, ("all", f"{videos * total / 1e12:,.1f}", ""))
    seconds = videos * total / (hardware.num_gpus * hardware.peak_tflops * 1e12 * ASSUMED_UTILISATION)
    hours = seconds * config.trainer.steps / 3600
    console.print(
        f"{trace.tokens * videos:,} LLM tokens a step. If {ASSUMED_UTILISATION:.0%} of the peak of {hardware.num_gpus} "
        f"GPUs is used (an assumption), a step takes {seconds:.1f} s and {config.trainer.steps:,} steps take "
        f"{hours:.1f} h, {hours * hardware.num_gpus:.0f} GPU-hours."
    )


def print_plan(config: TrainConfig, console: Console) -> None:
    """Print everything.

    Raises:
        ValueError: the GPUs cannot share the global batch.
    """
    hardware, trainer = config.hardware or HardwareConfig(), config.trainer
    with torch.device("meta"):
        glus = build_glus(config.model, load_weights=False)
    parts, sizes = count_parameters(glus), measure_sizes(glus)
    rows = [(part, f"{total:,}", f"{trained:,}") for part, (total, trained) in parts.items()]
    everything = ("all", f"{sizes.total:,}", f"{sizes.trained:,}")
    show_table(console, "parameters", ("part", "total>", "trained>"), rows, everything)
    traces = {wanted: trace_micro_batch(config, 1, wanted) for wanted in (False, True)}
    trace = traces[trainer.gradient_checkpointing]
    lines = memory_lines(config, sizes, hardware, trace)
    title = (
        f"memory of each of {hardware.num_gpus} GPUs: ZeRO {trainer.zero_stage}, {trainer.micro_batch_size} videos, "
        f"checkpointing {'on' if trainer.gradient_checkpointing else 'off'}, offload {trainer.offload.value}, "
        f"LLM quantisation {config.model.llm.quantization.value}"
    )
    show_memory(console, title, lines, hardware.gpu_memory_gb)
    show_memory(console, "memory of a node", host_lines(config, sizes, hardware), hardware.node_memory_gb)
    show_operations(console, config, hardware, trace)
    gpu, host = prediction_bytes(config, sizes)
    verdict = "fit" if total_bytes(lines) <= USABLE * hardware.gpu_memory_gb * GIB else "do NOT fit"
    console.print(
        f"Prediction takes {gpu / GIB:.1f} GiB of its GPU for the weights, and {host / GIB:.1f} GiB of the machine's "
        "memory for each process.\n"
        f"These settings {verdict} into {hardware.gpu_memory_gb:g} GiB ({USABLE:.0%} of it is counted on)."
    )
    best = recommend(config, sizes, hardware, traces)
    if best is None:
        console.print("No settings fit: a larger GPU, a smaller model, or fewer sentences and frames are needed.")
    else:
        console.print(f"Recommended ({best.bytes / GIB:.1f} GiB of each GPU):")
        console.print(best.overrides(), soft_wrap=True)


if __name__ == "__main__":
    Jobs("train", TrainConfig).start(lambda config: print_plan(config, tables()))
