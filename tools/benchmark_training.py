"""Measure training steps, ours against the plain procedure, in one run on the same weights and samples.

    python tools/benchmark_training.py --json benchmark.json
    python tools/benchmark_training.py --model glus_7b --device cuda --json benchmark_7b.json

The plain procedure shares nothing: each expression passes alone through CLIP, LLM and SAM2, with logits at every
position, and images for SAM2, those of context frames too, resized on the CPU and encoded one at a time. "As released"
is what the released GLUS shares of that: the conversations are one padded batch, and SAM2 encodes a query frame once
for all expressions of its video. All must give the same losses. Weights are random and samples are generated, so
nothing has to be downloaded; reading files is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

if not __package__:  # run as a program: what lies beside it is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus.batch import GlusOutput
from glus.config import GIB
from glus.config.jobs import user_errors
from glus.inference.video_run import StageClock
from glus.losses.objective import GlusObjective
from glus.models.glus import Glus
from glus.shapes.scene import Scene, generate_scene
from glus.train.engine import build_adamw
from tools.benchmarks.measuring import (
    Goal,
    Report,
    case_table,
    command_line,
    count_operations,
    finish,
    forget_peak,
    in_turns,
    key_table,
    matmul_tflops,
    median_ratio,
    peak_memory,
)
from tools.benchmarks.plain import (
    Inputs,
    build_training,
    count_tokens,
    counted,
    make_inputs,
    released_forward,
    stand_in_tokenizer,
    timed_verbs,
)

FRAME_SIZES = {"glus_tiny": 128, "glus_7b": 480}
"""Model -> side of the generated frames in pixels."""
FULL_SIZE_TOKENS = 64
"""Visual tokens of a frame at full size."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference of a loss from the plain procedure's, relative to it."""
WEIGHTS = {"seg": 1.0, "bce": 2.0, "dice": 0.5}


class Procedure(NamedTuple):
    """How a step is taken."""

    is_ours: bool = False
    """What training runs; else what is shared is what the released code shares."""
    is_alone: bool = False
    """Each expression is an input of its own."""
    checkpointing: bool = False
    """The LLM's layers are recomputed in the backward pass."""
    compiled: bool = False
    """The LLM's layers run compiled."""


PROCEDURES = {
    "ours": Procedure(is_ours=True),
    "ours, checkpointing": Procedure(is_ours=True, checkpointing=True),
    "as released": Procedure(),
    "plain": Procedure(is_alone=True),
    "ours, compiled": Procedure(is_ours=True, compiled=True),
}
UNCOMPILED = [name for name, procedure in PROCEDURES.items() if not procedure.compiled]
RATIOS = {"plain": "samples_per_second_ratio", "as released": "samples_per_second_ratio_to_released"}


@dataclass(frozen=True)
class Training:
    """A model, a micro-batch, and an optimizer at a rate of 0, so that all procedures keep the same weights."""

    glus: Glus
    whole: Inputs
    alone: list[Inputs]
    objective: GlusObjective
    optimizer: torch.optim.Optimizer
    device: torch.device

    def forward(self, procedure: Procedure) -> GlusOutput:
        """The procedure's forward pass."""
        if procedure.is_ours:
            output: GlusOutput = self.glus(self.whole.batch)
            return output
        return released_forward(self.glus, self.alone if procedure.is_alone else [self.whole])

    def losses(self, output: GlusOutput) -> dict[str, torch.Tensor]:
        """Of the whole micro-batch."""
        batch = self.whole.batch
        return self.objective(output, batch, self.objective.counts([batch]), np.random.default_rng(0))

    def step(self, procedure: Procedure, clock: StageClock) -> None:
        """One step, its parts timed."""
        self.glus.mllm.decoder.checkpoint_gradients(procedure.checkpointing)
        with torch.compiler.set_stance("default" if procedure.compiled else "force_eager"):
            with clock.stage("forward"):
                output = self.forward(procedure)
            with clock.stage("loss"):
                total = self.losses(output)["total"]
            with clock.stage("backward"):  # gradient checkpointing runs layers again, in the same stance
                total.backward()
        with clock.stage("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def observe(self, procedure: Procedure) -> dict[str, Any]:
        """Everything about a procedure but its time."""
        forget_peak(self.device)
        clock, parts = StageClock(self.device), defaultdict[str, float](float)
        self.step(procedure, StageClock(self.device))  # allocates the optimizer's moments, chooses kernels
        with count_operations() as flops:
            self.step(procedure, StageClock(self.device))
        with timed_verbs(self.glus, clock):
            self.step(procedure, clock)
        clock.add_to(parts)
        self.glus.eval()
        with torch.no_grad(), counted(self.glus) as counts:
            losses = {name: value.item() for name, value in self.losses(self.forward(procedure)).items()}
        self.glus.train()
        return {
            "losses": losses,
            "clip_encodes": counts["CLIP images"],
            "sam2_encodes": counts["SAM2 images"],
            "llm_tokens": count_tokens([self.whole] if procedure.is_ours else self.alone),
            "flops": flops.get_total_flops(),
            "peak_gib": peak_memory(self.device) / GIB,
            "part_seconds": dict(parts),
        }


def build(options: argparse.Namespace, scenes: Sequence[Scene], device: torch.device) -> Training:
    """The model that is asked for, and its micro-batch in both forms."""
    glus, tokenizer = build_training(options.model, device)
    whole, alone = make_inputs(scenes, options.context, tokenizer, glus.mllm, device)
    if options.compile:
        glus.mllm.decoder.compile_layers()
    trained = [parameter for parameter in glus.parameters() if parameter.requires_grad]
    optimizer = build_adamw(trained, 0.0, (0.9, 0.95), 0.0)
    return Training(glus, whole, alone, GlusObjective(WEIGHTS, tokenizer.vocabulary.seg_id), optimizer, device)


def benchmark(options: argparse.Namespace) -> Report:
    """Everything that is reported."""
    device, rng, length = torch.device(options.device), np.random.default_rng(0), options.context + options.query
    torch.manual_seed(0)
    scenes = [generate_scene(rng, length, FRAME_SIZES[options.model]) for _ in range(options.videos)]
    scenes = [replace(scene, sentences=scene.sentences[: options.expressions]) for scene in scenes]
    training = build(options, scenes, device)
    names = [*options.procedures, *["ours, compiled"] * options.compile]
    results = {name: training.observe(PROCEDURES[name]) for name in names}
    steps = {name: partial(training.step, PROCEDURES[name], StageClock(device)) for name in names}
    _, seconds = in_turns(steps, options.steps, device)
    dtype = training.glus.segmenter.dtype
    peak = options.peak_tflops or matmul_tflops(device, dtype)
    needed = [result["flops"] for name, result in results.items() if not PROCEDURES[name].checkpointing]
    for name, result in results.items():
        median = statistics.median(seconds[name])
        result |= {"seconds": median, "all_seconds": seconds[name], "samples_per_second": options.videos / median}
        result["tokens_per_second"] = result["llm_tokens"] / median
        if needed:  # else every procedure computes something twice
            result["mfu"] = min(needed) / median / peak / 1e12
    tokenizer = stand_in_tokenizer(FULL_SIZE_TOKENS)
    whole, alone = make_inputs(scenes, options.context, tokenizer, training.glus.mllm, torch.device("cpu"))
    full, fewer = count_tokens(alone), count_tokens([whole])
    values = {
        "llm_token_ratio": count_tokens(training.alone) / count_tokens([training.whole]),
        "llm_token_ratio_full_size": full / fewer,
        "llm_tokens_full_size": {"plain": full, "ours": fewer},
        "clip_encodes": results[names[0]]["clip_encodes"],
        "sam2_encodes": results[names[0]]["sam2_encodes"],
        "dtype": str(dtype).removeprefix("torch."),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "peak_tflops": peak,
        "procedures": results,
    }
    if "ours" in results:
        values |= {RATIOS[name]: median_ratio(seconds[name], seconds["ours"]) for name in RATIOS if name in results}
    tables = [case_table("Training", results), key_table("", {**values, "procedures": {}})]
    return Report(tables, values, compare_losses(results, values["dtype"]))


def compare_losses(results: Mapping[str, Mapping[str, Any]], dtype: str) -> list[Goal]:
    """Every procedure is to have the losses of the plain one (or of the first, where that was not measured)."""
    reference = "plain" if "plain" in results else next(iter(results))
    goals = []
    for name, result in results.items():
        for term, expected in results[reference]["losses"].items():
            found, most = result["losses"][term], TOLERANCE[dtype] * abs(expected)
            is_met = abs(found - expected) <= most
            goals.append(Goal(f"loss {term!r} of {name!r}", f"{found}", f"that of {reference!r}: {expected}", is_met))
    return goals


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = command_line(__doc__)
    parser.add_argument("--model", choices=FRAME_SIZES, default="glus_tiny", help="sizes, from configs/model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--videos", type=int, default=2, help="per micro-batch")
    parser.add_argument("--expressions", type=int, default=3, help="per video")
    parser.add_argument("--context", type=int, default=4, help="context frames")
    parser.add_argument("--query", type=int, default=4, help="query frames")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per procedure; the median counts")
    parser.add_argument(
        "--procedures", nargs="+", choices=UNCOMPILED, default=UNCOMPILED, metavar="NAME", help=", ".join(UNCOMPILED)
    )
    parser.add_argument("--compile", action="store_true", help="measure the LLM's layers compiled, too")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: a large matrix product, measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with user_errors():
        finish(benchmark(options), options.json)


if __name__ == "__main__":
    main()
