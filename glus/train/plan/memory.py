"""GPU memory of a training run, line by line, each with its formula."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from glus.config import HardwareConfig, Offload, Precision, Quantization, TrainConfig
from glus.models.build import PARTS
from glus.models.glus import Glus
from glus.train.optim import BUCKET_NUMBERS
from glus.train.plan.trace import Trace

GIB = 2**30
PROJECTION_BYTES = {Quantization.int8: 1.0 + 4 / 4096, Quantization.nf4: 0.5 + (1 + 4 / 256) / 64}
"""Bytes of a quantised weight: int8 with a float32 scale per row (here of 4096), 4 bits with an 8-bit scale per 64
values and a float32 one per 256 scales (QLoRA's double quantisation)."""
DEQUANTISED = 11008 * 4096 * 2
"""Bytes of the largest projection while it is multiplied with."""
LIVE_NUMBERS = 10**9
"""DeepSpeed's stage3_max_live_parameters: weights that stage 3 keeps gathered at most."""
CONTEXT_BYTES = 1.5 * GIB
"""Assumed: CUDA context, cuBLAS and NCCL workspaces of a process."""
PROCESS_BYTES = 3 * GIB
"""Assumed: Python, torch, CUDA's context and page-locked buffers in the machine's memory."""
FRAGMENTATION = 0.05
"""Assumed share of memory lost between allocations."""

GROUPS = ("lora", "embeddings", "lm_head", "llm", "clip", "projector", "seg_head", "iou_head", "mask_decoder",
          "image_encoder", "memory", "prompt_encoder")  # fmt: skip
"""Names of ``models.build.PARTS``, the special before the general; a parameter is counted in the first that fits."""


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the network."""

    name: str
    total: int
    trained: int


@dataclass(frozen=True)
class Line:
    """One entry of the memory of a GPU (or of its machine)."""

    what: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Sizes:
    """What the memory of a network's weights depends on."""

    total: int
    trained: int
    projections: int
    """Weights that quantisation applies to: the LLM's, frozen."""
    small: int
    """Weights that are drawn at random in float32 before any are loaded: all but those of LLM and CLIP."""


def count_parameters(glus: Glus) -> list[PartSize]:
    """Parameters by part; together every parameter once."""
    found: dict[str, list[nn.Parameter]] = {name: [] for name in (*GROUPS, "rest of SAM2")}
    for name, parameter in glus.named_parameters():
        part = next((group for group in GROUPS if any(key in name for key in PARTS[group])), "rest of SAM2")
        found[part].append(parameter)
    return [
        PartSize(name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
        for name, parameters in found.items()
    ]


def measure_sizes(glus: Glus) -> Sizes:
    """The counts that ``memory_lines`` needs."""
    parameters = dict(glus.named_parameters())
    projections = [p for name, p in parameters.items() if "_proj." in name and _is_quantisable(name)]
    return Sizes(
        total=sum(p.numel() for p in parameters.values()),
        trained=sum(p.numel() for p in parameters.values() if p.requires_grad),
        projections=sum(p.numel() for p in projections),
        small=sum(p.numel() for name, p in parameters.items() if not _is_born_empty(name)),
    )


def _is_quantisable(name: str) -> bool:
    return name.startswith("mllm.llama.model.layers.") and ".lora_" not in name


def _is_born_empty(name: str) -> bool:
    return name.startswith(("mllm.clip.", "mllm.llama.")) and ".lora_" not in name and not name.endswith(".new_rows")


def memory_lines(config: TrainConfig, sizes: Sizes, hardware: HardwareConfig, trace: Trace) -> list[Line]:
    """Memory of one GPU at its fullest moment.

    Args:
        config: of the run.
        sizes: of its network.
        hardware: how many GPUs share.
        trace: of a micro-batch of one video with the config's checkpointing; activations grow in proportion.
    """
    videos = config.trainer.micro_batch_size
    kept = sum(trace.kept.values()) * videos
    lines = [
        _weights(config, sizes, hardware.num_gpus),
        _optimizer(config, sizes, hardware.num_gpus),
        _gradients(config, sizes, hardware.num_gpus),
        _buffers(config, sizes),
    ]
    for part, size in trace.kept.items():
        lines.append(Line(f"activations: {part}", size * videos, f"{videos} videos x what autograd keeps of one"))
    passing = trace.peak * videos - kept
    lines.append(Line("passing tensors", passing, "most that is alive at once in a traced micro-batch, less the above"))
    lines.append(Line("CUDA, cuBLAS, NCCL", CONTEXT_BYTES, "assumed 1.5 GiB"))
    lost = FRAGMENTATION * total_bytes(lines)
    lines.append(Line("fragmentation", lost, f"assumed {FRAGMENTATION:.0%} of the above"))
    if config.trainer.zero_stage == 3:
        lines.append(_more_at_the_start(config, sizes, total_bytes(lines)))
    return lines


def _more_at_the_start(config: TrainConfig, sizes: Sizes, running: float) -> Line:
    """DeepSpeed cuts a model that is built whole only after it has moved it to the GPU, offloaded or not."""
    start = _numbers(config) * sizes.total + CONTEXT_BYTES
    formula = f"stage 3 begins with all weights on each GPU: {start / GIB:.1f} GiB, less the above"
    return Line("more at the start", max(0.0, start - running), formula)


def total_bytes(lines: Iterable[Line]) -> float:
    """Sum of the lines."""
    return sum(line.bytes for line in lines)


def _numbers(config: TrainConfig) -> int:
    return {Precision.fp32: 4, Precision.bf16: 2}[config.model.precision]


def _weights(config: TrainConfig, sizes: Sizes, gpus: int) -> Line:
    trainer, each, quantization = config.trainer, _numbers(config), config.model.llm.quantization
    whole = f"{each} B x {sizes.total:,}"
    if trainer.zero_stage == 3:
        gathered = min(LIVE_NUMBERS, sizes.total) * each
        if trainer.offload is Offload.parameters:
            return Line("weights", gathered, f"{each} B x at most 1e9 that are gathered; the others on the machine")
        share = max(each * sizes.total / gpus, 0)
        return Line("weights", share + gathered * (gpus > 1), f"{whole} / {gpus} GPUs + {each} B x 1e9 gathered")
    if quantization is Quantization.none:
        return Line("weights", each * sizes.total, whole)
    small = PROJECTION_BYTES[quantization]
    rest = sizes.total - sizes.projections
    formula = f"{small:.3f} B x {sizes.projections:,} + {each} B x {rest:,} + one projection dequantised"
    return Line("weights", small * sizes.projections + each * rest + DEQUANTISED, formula)


def _optimizer(config: TrainConfig, sizes: Sizes, gpus: int) -> Line:
    shares = gpus if config.trainer.zero_stage else 1
    # Parameters of float32 are their own master copy where nothing cuts them into shares.
    each = 8 if config.trainer.zero_stage == 0 and config.model.precision is Precision.fp32 else 12
    if config.trainer.offload is not Offload.none:
        return Line("optimizer", 0.0, "on the machine")
    formula = f"{each} B ({'master, ' if each == 12 else ''}two moments) x {sizes.trained:,} / {shares}"
    return Line("optimizer", each * sizes.trained / shares, formula)


def _gradients(config: TrainConfig, sizes: Sizes, gpus: int) -> Line:
    each, stage = _numbers(config), config.trainer.zero_stage
    if stage == 0:
        each += 4 if config.model.precision is Precision.bf16 else 0
        return Line("gradients", each * sizes.trained, f"{each} B (with their float32 sum) x {sizes.trained:,}")
    if config.trainer.offload is not Offload.none:
        return Line("gradients", 0.0, "on the machine, through the buffer below")
    return Line("gradients", each * sizes.trained / gpus, f"{each} B x {sizes.trained:,} / {gpus}")


def _buffers(config: TrainConfig, sizes: Sizes) -> Line:
    each = _numbers(config)
    if config.trainer.zero_stage == 0:
        return Line("communication", each * sizes.trained, f"{each} B x {sizes.trained:,} flattened")
    return Line("communication", each * BUCKET_NUMBERS, f"{each} B x {BUCKET_NUMBERS:,}, DeepSpeed's bucket")


def prediction_bytes(config: TrainConfig, sizes: Sizes) -> tuple[float, float]:
    """Weights of a process that predicts on its GPU, unquantised, and what it needs of the machine's memory."""
    return _numbers(config) * sizes.total, PROCESS_BYTES + 4.0 * sizes.small


def host_lines(config: TrainConfig, sizes: Sizes, hardware: HardwareConfig) -> list[Line]:
    """Memory of one node that training fills: its processes, what they draw at random, and offloaded parts.

    Weights are mapped from their files by one process and go to the GPUs tensor by tensor: the system's cache of files
    holds them if there is room, and is not counted.
    """
    model, processes = config.model, hardware.num_gpus // hardware.num_nodes
    drawn = sizes.small if model.weights or (model.llm.weights and model.clip.weights) else sizes.total
    lines = [
        Line("processes", PROCESS_BYTES * processes, f"assumed {PROCESS_BYTES / GIB:g} GiB x {processes}"),
        Line("drawn at random", 4.0 * drawn * processes, f"4 B x {drawn:,} x {processes} processes, passing"),
    ]
    if config.trainer.offload is not Offload.none:
        shares = hardware.num_nodes
        formula = f"16 B (gradients, master, two moments) x {sizes.trained:,} / {shares} nodes"
        lines.append(Line("offloaded optimizer", 16.0 * sizes.trained / shares, formula))
    if config.trainer.offload is Offload.parameters:
        each = _numbers(config)
        formula = f"{each} B x {sizes.total:,} / {hardware.num_nodes} nodes"
        lines.append(Line("offloaded weights", each * sizes.total / hardware.num_nodes, formula))
    return lines
