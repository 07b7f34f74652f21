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
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from glus.batch import GlusOutput, TrainSample
from glus.config import ModelConfig, load_config
from glus.data.chat import wording as prompts
from glus.data.chat.llava import LlavaChat, train_vocabulary
from glus.data.loader import collate
from glus.files import write_text
from glus.losses.objective import GlusObjective
from glus.models.build import build_random
from glus.models.glus import Glus
from glus.models.mllm.llava import clip_crop
from glus.shapes.scene import Scene, generate_scene
from glus.tokens import Vocabulary
from glus.train.measure import count_operations, forget_peak, matmul_tflops, peak_memory, synchronize
from glus.train.optim import build_adamw
from glus.train.plain import Forward, Inputs, count_tokens, make_inputs, plain_forward, released_forward, shared_forward
from glus.types import ObjectKey

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
FRAME_SIZES = {"glus_tiny": 128, "glus_7b": 480}
"""Model -> side of the generated frames in pixels."""
FULL_SIZE_TOKENS = 64
"""Visual tokens of a frame at full size."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference of a loss from the plain procedure's, relative to it."""
WEIGHTS = {"seg": 1.0, "bce": 2.0, "dice": 0.5}


class Way(NamedTuple):
    """How a procedure takes a step."""

    forward: Forward
    checkpointing: bool = False
    compiled: bool = False


PROCEDURES = {
    "ours": Way(shared_forward),
    "ours, checkpointing": Way(shared_forward, checkpointing=True),
    "as released": Way(released_forward),
    "plain": Way(plain_forward),
    "ours, compiled": Way(shared_forward, compiled=True),
}
UNCOMPILED = [name for name, way in PROCEDURES.items() if not way.compiled]


class Steps:
    """Training steps of one procedure.

    Args:
        glus: in training mode.
        inputs: one micro-batch.
        forward: the procedure.
        objective: the losses.
        optimizer: of the trained parameters, at a rate of 0, so that all procedures keep the same weights.
        checkpointing: recompute the LLM's layers in the backward pass.
        compiled: run the LLM's layers compiled, where they are.
    """

    def __init__(
        self,
        glus: Glus,
        inputs: Inputs,
        forward: Forward,
        objective: GlusObjective,
        optimizer: torch.optim.Optimizer,
        checkpointing: bool = False,
        compiled: bool = False,
    ):
        self.glus = glus
        self.inputs = inputs
        self.forward = forward
        self.checkpointing = checkpointing
        self.compiled = compiled
        self.objective = objective
        self.optimizer = optimizer

    def losses(self) -> dict[str, float]:
        """Of one forward pass without dropout."""
        self.glus.eval()
        with torch.no_grad():
            terms = self._loss(self._forward())
        self.glus.train()
        return {name: value.item() for name, value in terms.items()}

    def run(self, clock: Counter[str] | None = None) -> None:
        """One step; ``clock`` gets the seconds of its parts."""
        before = time.perf_counter()
        if self.checkpointing:
            self.glus.mllm.checkpoint_gradients()
        output = self._forward()
        before = self._tick(clock, "forward", before)
        total = self._loss(output)["total"]
        before = self._tick(clock, "loss", before)
        with self._stance():  # also of what gradient checkpointing runs again
            total.backward()
        before = self._tick(clock, "backward", before)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._tick(clock, "optimizer", before)
        if self.checkpointing:
            self.glus.mllm.checkpoint_gradients(False)

    def _forward(self) -> GlusOutput:
        with self._stance():
            return self.forward(self.glus, self.inputs)

    def _stance(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("default" if self.compiled else "force_eager")

    def _loss(self, output: GlusOutput) -> dict[str, torch.Tensor]:
        batch = self.inputs.batch
        return self.objective(output, batch, self.objective.counts([batch]), np.random.default_rng(0))

    def _tick(self, clock: Counter[str] | None, part: str, before: float) -> float:
        if clock is None:
            return before
        synchronize(self.inputs.ids_NL.device)
        now = time.perf_counter()
        clock[part] += now - before  # type: ignore[assignment]
        return now


@contextmanager
def timed_verbs(glus: Glus, device: torch.device, clock: Counter[str]) -> Iterator[None]:
    """Add the seconds that the model's verbs take in the forward pass to ``clock``."""
    segmenter, language = glus.segmenter, glus.mllm
    verbs: list[tuple[str, Any, str]] = [
        ("CLIP", glus, "vision_tokens"),
        *(("LLM", language, name) for name in ("states", "packed_states", "logits")),
        ("SAM2 resize", segmenter, "prepare_frames"),
        ("SAM2 encoder", segmenter, "encode_frames"),
        *(("memory and masks", segmenter, name) for name in ("condition", "decode", "memorize")),
    ]

    def timed(label: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            synchronize(device)
            before = time.perf_counter()
            result = method(*arguments)
            synchronize(device)
            clock[label] += time.perf_counter() - before  # type: ignore[assignment]
            return result

        return run

    with ExitStack() as stack:
        for label, owner, name in verbs:
            setattr(owner, name, timed(label, getattr(owner, name)))
            stack.callback(delattr, owner, name)
        yield


def count_encodes(steps: Steps) -> tuple[int, int]:
    """Frames that CLIP and SAM2's image encoder see in one forward pass."""
    seen: Counter[str] = Counter()
    glus = steps.glus

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.update({name: len(inputs[0])})

    handles = [
        glus.mllm.clip.register_forward_pre_hook(hook("clip")),
        glus.segmenter.sam.image_encoder.register_forward_pre_hook(hook("sam2")),
    ]
    steps.losses()
    for handle in handles:
        handle.remove()
    return seen["clip"], seen["sam2"]


def measure(procedures: dict[str, Steps], num_steps: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds per step (median; the procedures take turns), seconds by part, peak memory, FLOPs, frames encoded."""
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    results: dict[str, dict[str, Any]] = {}
    for name, steps in procedures.items():
        clock: Counter[str] = Counter()
        forget_peak(device)
        steps.run()  # allocates the optimizer's moments, chooses kernels
        with count_operations() as flops:
            steps.run()
        with timed_verbs(steps.glus, device, clock):
            steps.run(clock)
        clip, sam2 = count_encodes(steps)
        results[name] = {
            "losses": steps.losses(),
            "clip_encodes": clip,
            "sam2_encodes": sam2,
            "flops": flops.get_total_flops(),
            "peak_gib": peak_memory(device) / 2**30,
            "part_seconds": dict(clock),
        }
    for _ in range(num_steps):
        for name, steps in procedures.items():
            synchronize(device)
            before = time.perf_counter()
            steps.run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - before)
    for name, values in seconds.items():
        results[name] |= {"seconds": statistics.median(values), "all_seconds": values}
    return results


def build_model(name: str, tokenizer: Path, device: torch.device) -> Glus:
    """A model of ``configs/model`` with random weights, in training mode but without dropout."""
    content = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert isinstance(content, DictConfig)
    for part in ("clip", "llm", "segmenter"):
        content[part].weights = None
    content.llm.tokenizer = str(tokenizer)
    content.llm.lora_dropout = 0.0
    glus = build_random(load_config(ModelConfig, content), device).train()
    for module in glus.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):  # SAM2's attention keeps its own
            module.dropout_p = 0.0  # type: ignore[assignment]
    return glus


def draw_scenes(count: int, options: argparse.Namespace) -> list[Scene]:
    """Generated videos with at least as many sentences as wanted."""
    rng, length = np.random.default_rng(0), options.context + options.query
    return [generate_scene(rng, length, FRAME_SIZES[options.model]) for _ in range(count)]


def make_vocabulary(folder: Path, scenes: Sequence[Scene], whole_templates: bool) -> Vocabulary:
    """Of a small model, or with words for tokens, nearly as a full-size model counts them."""
    sentences = [sentence.text for scene in scenes for sentence in scene.sentences]
    target = folder / ("templates" if whole_templates else "words")
    train_vocabulary(target, sentences, 450 if whole_templates else 2000, whole_templates)
    return Vocabulary(target)


def make_samples(
    scenes: Sequence[Scene], tokenizer: LlavaChat, side: int, options: argparse.Namespace
) -> list[TrainSample]:
    """One per scene, the same whenever it is called."""
    return [make_sample(scene, number, tokenizer, side, options) for number, scene in enumerate(scenes)]


def make_sample(scene: Scene, number: int, tokenizer: LlavaChat, side: int, options: argparse.Namespace) -> TrainSample:
    """The first frames are context."""
    rng, query = np.random.default_rng(number), slice(options.context, None)
    sentences = scene.sentences[: options.expressions]
    names = [f"shapes/{number}/{row}" for row in range(len(sentences))]
    crops = np.stack([clip_crop(frame, side) for frame in scene.frames_THW3])
    return TrainSample(
        context_pixels=crops[: options.context],
        query_pixels=crops[query],
        query_frames=scene.frames_THW3[query],
        conversations=[
            tokenizer.train(prompts.draw_turns(sentence.text, options.query, rng), options.context, name)
            for sentence, name in zip(sentences, names, strict=True)
        ],
        target_masks=[
            np.asarray(scene.masks_OTHW[list(sentence.object_ids), query].any(0), np.uint8) for sentence in sentences
        ],
        object_keys=[
            [ObjectKey("shapes", str(number), name, str(q), frozenset()) for q in range(options.query)]
            for name in names
        ],
        names=names,
    )


def check_losses(results: dict[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """Raise unless every procedure has the losses of the plain one (or of the first, where that was not measured).

    Raises:
        ValueError: one has not.
    """
    reference = "plain" if "plain" in results else next(iter(results))
    for name, result in results.items():
        for term, expected in results[reference]["losses"].items():
            if not abs(result["losses"][term] - expected) <= TOLERANCE[dtype] * abs(expected):
                raise ValueError(
                    f"loss {term!r} of {name!r} is {result['losses'][term]}, that of {reference!r} is {expected}"
                )


def build_procedures(glus: Glus, inputs: Inputs, seg_id: int, options: argparse.Namespace) -> dict[str, Steps]:
    """The procedures that are asked for, all with one optimizer."""
    trained = [parameter for parameter in glus.parameters() if parameter.requires_grad]
    shared = GlusObjective(WEIGHTS, seg_id), build_adamw(trained, 0.0, (0.9, 0.95), 0.0)
    names = [*options.procedures, *(["ours, compiled"] if options.compile else [])]
    if "ours, compiled" in names:
        glus.mllm.compile_layers()
    ways = {name: PROCEDURES[name] for name in names}
    return {
        name: Steps(glus, inputs, way.forward, *shared, way.checkpointing, way.compiled) for name, way in ways.items()
    }


def needed_operations(results: dict[str, dict[str, Any]]) -> int | None:
    """Operations of a step in which nothing is computed twice; None where every procedure recomputes."""
    return min((r["flops"] for name, r in results.items() if not PROCEDURES[name].checkpointing), default=None)


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as many samples ours takes per second, of the procedures that were measured."""
    names = {"samples_per_second_ratio": "plain", "samples_per_second_ratio_to_released": "as released"}
    return {
        key: results[name]["seconds"] / results["ours"]["seconds"]
        for key, name in names.items()
        if {name, "ours"} <= set(results)
    }


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return what ``--json`` writes."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    scenes = draw_scenes(options.videos, options)
    with tempfile.TemporaryDirectory() as folder:
        small, full = (make_vocabulary(Path(folder), scenes, whole) for whole in (True, False))
        own = Vocabulary(options.tokenizer) if options.tokenizer else small if options.model == "glus_tiny" else full
        glus = build_model(options.model, own.folder, device)
    samples = make_samples(scenes, LlavaChat(own, glus.mllm.tokens_per_frame), glus.mllm.clip.image_size, options)
    inputs = make_inputs(samples, [scene.frames_THW3 for scene in scenes], own.pad_id, options.device)
    tokens = count_tokens(inputs.batch)
    full_samples = make_samples(scenes, LlavaChat(full, FULL_SIZE_TOKENS), 32, options)
    full_tokens = count_tokens(collate(full_samples, full.pad_id))
    dtype = glus.segmenter.dtype
    results = measure(build_procedures(glus, inputs, own.seg_id, options), options.steps, device)
    peak = options.peak_tflops or matmul_tflops(device, dtype)
    needed = needed_operations(results)
    for name, result in results.items():
        result["samples_per_second"] = options.videos / result["seconds"]
        result["llm_tokens"] = tokens["ours" if name.startswith("ours") else "plain"]
        result["tokens_per_second"] = result["llm_tokens"] / result["seconds"]
        if needed is not None:
            result["mfu"] = needed / result["seconds"] / peak / 1e12
    first = next(iter(results.values()))
    return ratios(results) | {
        "llm_token_ratio": tokens["plain"] / tokens["ours"],
        "llm_token_ratio_full_size": full_tokens["plain"] / full_tokens["ours"],
        "llm_tokens_full_size": full_tokens,
        "clip_encodes": first["clip_encodes"],
        "sam2_encodes": first["sam2_encodes"],
        "dtype": str(dtype).removeprefix("torch."),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "peak_tflops": peak,
        "procedures": results,
    }


ROWS: tuple[tuple[str, str, str], ...] = (
    ("samples (videos) per second", "samples_per_second", ".3f"),
    ("seconds per step", "seconds", ".3f"),
    ("LLM tokens per second", "tokens_per_second", ".0f"),
    ("LLM tokens per step", "llm_tokens", "d"),
    ("CLIP encodes per step", "clip_encodes", "d"),
    ("SAM2 encodes per step", "sam2_encodes", "d"),
    ("10^12 operations per step", "flops", ""),
    ("model FLOPs utilisation, %", "mfu", ""),
    ("peak memory, GiB", "peak_gib", ".2f"),
)


def print_table(report: dict[str, Any], console: Console) -> None:
    """One column per procedure."""
    procedures, scale = report["procedures"], {"flops": 1e-12, "mfu": 100.0}
    table = Table("per micro-batch", *procedures)
    for title, key, form in ROWS:
        values = [result[key] * scale.get(key, 1) if key in result else None for result in procedures.values()]
        table.add_row(title, *("" if value is None else format(value, form or ".3f") for value in values))
    parts = dict.fromkeys(part for result in procedures.values() for part in result["part_seconds"])
    for part in parts:
        table.add_row(f"seconds: {part}", *(f"{r['part_seconds'].get(part, 0.0):.3f}" for r in procedures.values()))
    console.print(table)
    full, fewer = report["llm_tokens_full_size"], report["llm_token_ratio_full_size"]
    for key, name in (("samples_per_second_ratio", "plain"), ("samples_per_second_ratio_to_released", "as released")):
        if key in report:
            console.print(f"samples per second: {report[key]:.2f} x {name}")
    console.print(
        f"LLM tokens at full size: {full['ours']} for {full['plain']}, {fewer:.2f} x fewer\n"
        f"peak of the device: {report['peak_tflops']:.3g} TFLOP/s"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=FRAME_SIZES, default="glus_tiny", help="sizes, from configs/model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokenizer", type=Path, help="folder of a vocabulary; default: made of the sentences")
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    try:
        report = benchmark(options)
        check_losses(report["procedures"], getattr(torch, report["dtype"]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print_table(report, Console() if sys.stdout.isatty() else Console(width=120))
    if options.json:
        write_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
