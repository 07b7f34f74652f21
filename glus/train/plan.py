"""What a training run costs on a machine, before it is started: parameters, memory, operations, and what fits.

One micro-batch runs through the real network, forwards and backwards, on the meta device: shapes without values. So a
full-size network is traced on a laptop in seconds, and whatever it does is what is counted: every tensor that comes to
life and goes again, and every matrix product.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from glus.batch import Batch, Conversation
from glus.config import (
    BUCKET_NUMBERS,
    GIB,
    HardwareConfig,
    Offload,
    Precision,
    Quantization,
    SegState,
    TrainConfig,
    nominal_tflops,
)
from glus.data.dataset import collate, make_sample
from glus.losses.objective import TERMS, GlusObjective
from glus.models.build import OF_ANY_SIZE, parts_of
from glus.models.glus import Glus
from glus.models.mllm import Mllm
from glus.models.pretrained import build_glus
from glus.tokens import IMAGE_ID
from glus.types import Role

COST_PARTS = ("vision tower", "LLM", "SAM2 image encoder", "SAM2 memory and decoder", "losses and the rest")
_, LLM, IMAGE_ENCODER, DECODER, REST = COST_PARTS
FRAME_SIZE = (720, 1280)
"""Height and width that losses are computed at: Ref-YouTube-VOS and most of MeViS."""
EXPRESSION_TOKENS = 10
"""SentencePiece length of a middling sentence."""
SYSTEM_TOKENS, CONTEXT_TOKENS, TURN_TOKENS = 34, 11, 26
"""LLaMA's tokens of the texts of ``chat/llava.py``: before the frames, after the context, and around a sentence."""
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

GROUPS = ("lora", "embeddings", "lm_head", "llm", "clip", "vision", "projector", "seg_head", "iou_head", "mask_decoder",
          "image_encoder", "memory", "prompt_encoder")  # fmt: skip
"""Names of ``models.build.parts_of``, the special before the general; a parameter is counted in the first that fits."""
USABLE = 0.94
"""Share of a GPU's memory that a plan may fill; the driver keeps some."""
MAX_MICRO_BATCH = 10
"""Videos; a GPU is busy long before."""


@dataclass(frozen=True)
class Trace:
    """What one micro-batch needs of one process."""

    flops: dict[str, float]
    """Part -> operations of matrix products (a multiplication and an addition are two), forwards and backwards."""
    kept: dict[str, float]
    """Part -> bytes of activations alive when the forward pass is over: what the backward pass reads."""
    peak: float
    """Bytes alive at most, without weights, and with each parameter's gradient gone as soon as it is made."""
    tokens: int
    """Positions the LLM reads, padding included."""


def example_batch(config: TrainConfig, mllm: Mllm, num_videos: int) -> Batch:
    """A batch of the config's sizes: black frames, sentences of ``EXPRESSION_TOKENS``, as many as may be drawn."""
    frames, count = config.frames, config.data.expressions_per_video
    black_HW3 = np.zeros((*FRAME_SIZE, 3), np.uint8)
    context, query = [black_HW3] * frames.num_context, [black_HW3] * frames.num_query
    conversations = [_conversation(config, mllm, 1 + row) for row in range(count)]
    masks = [np.zeros((len(query), *FRAME_SIZE), np.uint8)] * count
    return collate([make_sample(mllm.prepare, context, query, conversations, masks)] * num_videos, pad_id=0)


def _conversation(config: TrainConfig, mllm: Mllm, word: int) -> Conversation:
    """Lengths as of real text; all words of its turns are ``word``, so that another sentence differs from there on."""
    num_context, num_query = config.frames.num_context, config.frames.num_query
    context, query = (  # each between its start and end tokens
        np.array([0, *[IMAGE_ID] * math.prod(mllm.grid(FRAME_SIZE, role)), 0]) for role in Role
    )
    opening = [np.zeros(SYSTEM_TOKENS), *[context] * num_context, np.zeros(CONTEXT_TOKENS if num_context else 0)]
    turn = np.concatenate([query, np.full(TURN_TOKENS + EXPRESSION_TOKENS, word)])
    input_ids = np.concatenate([*opening, *[turn] * num_query]).astype(np.int64)
    axes = np.zeros((len(input_ids), 3), np.int64) if mllm.chat.has_axes else None
    before = len(input_ids) - 2 - len(turn) * np.arange(num_query)[::-1]
    return Conversation(input_ids, before, axes, config.model.seg_state is SegState.at)


def attention_counts() -> dict[Any, Callable[..., int]]:
    """Kernel of attention, forwards or backwards -> what counts its operations, given its arguments, tensors as shapes.

    Causal attention counts half of the square, since kernels leave out what is hidden. The CPU's kernel, which torch
    does not count, is among them.
    """
    names = ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{n}{end}") for n, end in product(names, ("", "_backward"))]
    return {kernel: _attention_count(kernel) for kernel in kernels}


def _attention_count(kernel: Any) -> Callable[..., int]:
    names = [argument.name for argument in kernel.default._schema.arguments]
    count, number = (sdpa_flop_count, 3) if names[0] == "query" else (sdpa_backward_flop_count, 4)
    causal = names.index("is_causal")

    def operations(*arguments: Any, **options: Any) -> int:
        is_causal = arguments[causal] if len(arguments) > causal else options.get("is_causal", False)
        return count(*arguments[:number]) // (2 if is_causal else 1)

    return operations


class LikeOnGpu(TorchFunctionMode):
    """What the meta device would do otherwise than a GPU: attention that writes no matrix of scores, and conditions
    on values, which are answered as for a batch with padding."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _flash_attention(*args, **(kwargs or {}))
        if func is torch.Tensor.__bool__ and args[0].device.type == "meta":
            return False
        return func(*args, **(kwargs or {}))


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: object = None, **options: Any
) -> torch.Tensor:
    if options.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    flash, dropout = torch.ops.aten._scaled_dot_product_flash_attention, options.get("dropout_p", 0.0)
    return flash(query, key, value, dropout, options.get("is_causal", False), scale=options.get("scale"))[0]


class CostCounter(TorchDispatchMode):
    """Bytes of the tensors alive, and operations, by the part that is at work.

    Parts are told apart by few hooks, not by ``torch.utils.module_tracker``, whose hooks keep recomputed activations
    alive.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.part = REST
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.peak = 0
        attention = {kernel: shape_wrapper(count) for kernel, count in attention_counts().items()}
        self._counts: dict[Any, Callable[..., int]] = {**flop_registry, **attention}
        self._device = device
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in self._counts:
            self.flops[self.part] += self._counts[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes.total())
        return result

    def ignore(self, tensors: list[torch.Tensor]) -> None:
        """Do not count these: they are there whatever happens."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def switch(self, part: str) -> Callable[..., None]:
        """A hook after which ``part`` is at work."""

        def hook(*_: object) -> None:
            self.part = part

        return hook

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size, part = storage._cdata, storage.nbytes(), self.part
        if key in self._known:
            return
        self._known.add(key)
        self.bytes[part] += size
        weakref.finalize(storage, self._forget, key, size, part)

    def _forget(self, key: int, size: int, part: str) -> None:
        self._known.discard(key)
        self.bytes[part] -= size


def trace_micro_batch(config: TrainConfig, num_videos: int, checkpointing: bool) -> Trace:
    """Count what one micro-batch costs.

    Args:
        config: of the run; the contrastive term, whose tensors are tiny, is left out, and quantised weights are traced
            as what they are computed with.
        num_videos: of the micro-batch.
        checkpointing: recompute the LLM's layers in the backward pass.
    """
    with torch.device("meta"):
        glus = build_glus(config.model, load_weights=False).train()
    if checkpointing:
        glus.mllm.decoder.checkpoint_gradients()
    weights = {name: weight for name, weight in config.loss.weights.items() if name in TERMS}
    batch = example_batch(config, glus.mllm, num_videos)
    with LikeOnGpu(), torch.device("meta"):
        return count_costs(glus, GlusObjective(weights, seg_id=0), batch.to("meta"))


def peak_videos_per_second(config: TrainConfig, card: str, num_gpus: int) -> float | None:
    """Videos of the config's sizes that GPUs would train on in a second, if they recomputed nothing and did nothing but
    products at the speed that their maker tells; None for a card that is not known, or a CPU."""
    tflops = nominal_tflops(card)
    if tflops is None:
        return None
    return num_gpus * tflops * 1e12 / sum(trace_micro_batch(config, 1, checkpointing=False).flops.values())


def count_costs(glus: Glus, objective: GlusObjective, batch: Batch) -> Trace:
    """Run a micro-batch forwards and backwards and count what happens, on whatever device the batch is.

    Gradients of parameters are dropped as soon as they are made, as ZeRO does. In the backward pass, what comes before
    the gradient of the [SEG] embeddings is the decoder's, and what follows is the LLM's.
    """
    counter = CostCounter(batch.rows.input_ids_BL.device)
    counter.ignore([*glus.parameters(), *glus.buffers()])
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in glus.parameters() if p.requires_grad]
    parts = {**{part: (module,) for part, module in glus.mllm.stages.items()}, **glus.segmenter.stages}
    for part, modules in parts.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(counter.switch(part)))
            if part != DECODER:  # which also computes outside its modules, up to the losses
                hooks.append(module.register_forward_hook(counter.switch(REST)))
    with counter:
        output = glus(batch)
        counter.part = REST
        losses = objective(output, batch, objective.counts([batch]), np.random.default_rng(0))
        kept = {part: float(counter.bytes[part]) for part in COST_PARTS}
        output.seg_embeds_NQC.register_hook(counter.switch(LLM))
        counter.part = DECODER
        run_backward(losses["total"])
    for hook in hooks:
        hook.remove()
    flops = {part: float(counter.flops[part]) for part in COST_PARTS}
    return Trace(flops, kept, float(counter.peak), batch.rows.input_ids_BL.numel())


def run_backward(loss: torch.Tensor) -> None:
    """As ``loss.backward()``, which however suspends function modes, so that recomputed layers would escape
    ``LikeOnGpu``."""
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True)
class Line:
    """One entry of the memory of a GPU (or of its machine)."""

    what: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class WeightCounts:
    """What the memory of a network's weights depends on."""

    total: int
    trained: int
    projections: int
    """Weights that quantisation applies to: the LLM's, frozen."""
    small: int
    """Weights that are drawn at random in float32 before any are loaded: all but those of LLM and CLIP."""


def count_parameters(glus: Glus) -> dict[str, tuple[int, int]]:
    """Part of the network -> its parameters and how many of them are trained; together every parameter once."""
    parts = parts_of(glus)
    groups = [group for group in GROUPS if group in parts]
    found = {name: [0, 0] for name in (*groups, "rest of SAM2")}
    for name, parameter in glus.named_parameters():
        part = next((group for group in groups if any(key in name for key in parts[group])), "rest of SAM2")
        found[part][0] += parameter.numel()
        found[part][1] += parameter.numel() * parameter.requires_grad
    return {part: (total, trained) for part, (total, trained) in found.items()}


def measure_sizes(glus: Glus) -> WeightCounts:
    """The counts that ``memory_lines`` needs."""
    totals, trained = zip(*count_parameters(glus).values(), strict=True)
    sizes = {name: parameter.numel() for name, parameter in glus.named_parameters()}
    plain = {name: size for name, size in sizes.items() if ".lora_" not in name and not name.endswith(".new_rows")}
    layers, parts = f"{glus.mllm.decoder.prefix}layers.", parts_of(glus)
    projections = sum(size for name, size in plain.items() if name.startswith(layers) and "_proj." in name)
    towers = tuple(start for part in ("clip", "vision", "llm") for start in parts.get(part, ()))
    small = sum(sizes.values()) - sum(size for name, size in plain.items() if name.startswith(towers))
    return WeightCounts(sum(totals), sum(trained), projections, small)


def memory_lines(config: TrainConfig, sizes: WeightCounts, hardware: HardwareConfig, trace: Trace) -> list[Line]:
    """Memory of one GPU at its fullest moment.

    Args:
        config: of the run.
        sizes: of its network.
        hardware: how many GPUs share.
        trace: of a micro-batch of one video with the config's checkpointing; activations grow in proportion.
    """
    videos, gpus = config.trainer.micro_batch_size, hardware.num_gpus
    lines = [_weights(config, sizes, gpus), *_optimizer_lines(config, sizes, gpus)]
    for part, size in trace.kept.items():
        lines.append(Line(f"activations: {part}", size * videos, f"{videos} videos x what autograd keeps of one"))
    passing = trace.peak * videos - sum(trace.kept.values()) * videos
    lines.append(Line("passing tensors", passing, "most that is alive at once in a traced micro-batch, less the above"))
    lines.append(Line("CUDA, cuBLAS, NCCL", CONTEXT_BYTES, "assumed 1.5 GiB"))
    lost = FRAGMENTATION * total_bytes(lines)
    lines.append(Line("fragmentation", lost, f"assumed {FRAGMENTATION:.0%} of the above"))
    if config.trainer.zero_stage == 3:
        # DeepSpeed cuts a model that is built whole only after it has moved it to the GPU, offloaded or not.
        start = _number_bytes(config) * sizes.total + CONTEXT_BYTES
        formula = f"stage 3 begins with all weights on each GPU: {start / GIB:.1f} GiB, less the above"
        lines.append(Line("more at the start", max(0.0, start - total_bytes(lines)), formula))
    return lines


def total_bytes(lines: Iterable[Line]) -> float:
    """Sum of the lines."""
    return sum(line.bytes for line in lines)


def _number_bytes(config: TrainConfig) -> int:
    return {Precision.fp32: 4, Precision.bf16: 2}[config.model.precision]


def _weights(config: TrainConfig, sizes: WeightCounts, gpus: int) -> Line:
    trainer, each, quantization = config.trainer, _number_bytes(config), config.model.llm.quantization
    whole = f"{each} B x {sizes.total:,}"
    if trainer.zero_stage == 3:
        gathered = min(LIVE_NUMBERS, sizes.total) * each
        if trainer.offload is Offload.parameters:
            return Line("weights", gathered, f"{each} B x at most 1e9 that are gathered; the others on the machine")
        size = each * sizes.total / gpus + gathered * (gpus > 1)
        return Line("weights", size, f"{whole} / {gpus} GPUs + {each} B x 1e9 gathered")
    if quantization is Quantization.none:
        return Line("weights", each * sizes.total, whole)
    small, rest = PROJECTION_BYTES[quantization], sizes.total - sizes.projections
    formula = f"{small:.3f} B x {sizes.projections:,} + {each} B x {rest:,} + one projection dequantised"
    return Line("weights", small * sizes.projections + each * rest + DEQUANTISED, formula)


def _optimizer_lines(config: TrainConfig, sizes: WeightCounts, gpus: int) -> list[Line]:
    """Optimizer, gradients, and the buffer that they are summed through."""
    each, trained = _number_bytes(config), sizes.trained
    buffer = Line("communication", each * BUCKET_NUMBERS, f"{each} B x {BUCKET_NUMBERS:,}, DeepSpeed's bucket")
    if config.trainer.offload is not Offload.none:
        gradients = Line("gradients", 0.0, "on the machine, through the buffer below")
        return [Line("optimizer", 0.0, "on the machine"), gradients, buffer]
    return [
        Line("optimizer", 12 * trained / gpus, f"12 B (master, two moments) x {trained:,} / {gpus}"),
        Line("gradients", each * trained / gpus, f"{each} B x {trained:,} / {gpus}"),
        buffer,
    ]


def prediction_bytes(config: TrainConfig, sizes: WeightCounts) -> tuple[float, float]:
    """Weights of a process that predicts on its GPU, unquantised, and what it needs of the machine's memory."""
    return _number_bytes(config) * sizes.total, PROCESS_BYTES + 4.0 * sizes.small


def host_lines(config: TrainConfig, sizes: WeightCounts, hardware: HardwareConfig) -> list[Line]:
    """Memory of one node that training fills: its processes, what they draw at random, and offloaded parts.

    Weights are mapped from their files by one process and go to the GPUs tensor by tensor: the system's cache of files
    holds them if there is room, and is not counted.
    """
    model, processes = config.model, hardware.num_gpus // hardware.num_nodes
    is_loaded = model.llm.weights and (model.clip.weights or not model.clip.architecture)
    drawn = sizes.small if model.weights or is_loaded else sizes.total
    lines = [
        Line("processes", PROCESS_BYTES * processes, f"assumed {PROCESS_BYTES / GIB:g} GiB x {processes}"),
        Line("drawn at random", 4.0 * drawn * processes, f"4 B x {drawn:,} x {processes} processes, passing"),
    ]
    if config.trainer.offload is not Offload.none:
        shares = hardware.num_nodes
        formula = f"16 B (gradients, master, two moments) x {sizes.trained:,} / {shares} nodes"
        lines.append(Line("offloaded optimizer", 16.0 * sizes.trained / shares, formula))
    if config.trainer.offload is Offload.parameters:
        each = _number_bytes(config)
        formula = f"{each} B x {sizes.total:,} / {hardware.num_nodes} nodes"
        lines.append(Line("offloaded weights", each * sizes.total / hardware.num_nodes, formula))
    return lines


@dataclass(frozen=True)
class Option:
    """One way to train."""

    config: TrainConfig
    bytes: float
    """Per GPU."""

    def overrides(self) -> str:
        """What to put on the command line."""
        trainer = self.config.trainer
        return (
            f"trainer.zero_stage={trainer.zero_stage} trainer.micro_batch_size={trainer.micro_batch_size} "
            f"trainer.gradient_checkpointing={str(trainer.gradient_checkpointing).lower()} "
            f"trainer.offload={trainer.offload.value} model.llm.quantization={self.config.model.llm.quantization.value}"
        )


def micro_batch_sizes(global_batch_size: int, num_gpus: int) -> list[int]:
    """Micro-batch sizes that share a global batch equally, the largest first; empty if the GPUs cannot.

    Raises:
        ValueError: the number of GPUs does not divide the batch; names the numbers nearby that do.
    """
    if global_batch_size % num_gpus:
        below = max(n for n in range(1, num_gpus) if global_batch_size % n == 0)
        above = [n for n in range(num_gpus, global_batch_size + 1) if global_batch_size % n == 0][:1]
        near = " or ".join(map(str, [below, *above]))
        raise ValueError(
            f"hardware.num_gpus={num_gpus} cannot share trainer.global_batch_size={global_batch_size} equally: "
            f"use {near} of them"
        )
    share = global_batch_size // num_gpus
    return [size for size in range(min(share, MAX_MICRO_BATCH), 0, -1) if share % size == 0]


def options(
    config: TrainConfig, sizes: WeightCounts, hardware: HardwareConfig, traces: dict[bool, Trace]
) -> Iterator[Option]:
    """All ways to train, the best first, whether they fit or not.

    What changes no number comes before what does (quantisation); what slows least comes first: no offloading, no
    recomputing, stage 2 (whose traffic is that of plain data parallelism) before stage 3, large micro-batches.

    Args:
        config: of the run; its global batch is kept.
        sizes: of its network.
        hardware: the machine.
        traces: of a micro-batch of one video, without and with gradient checkpointing.
    """
    none, nf4 = Quantization.none, Quantization.nf4
    is_one, is_cut = hardware.num_gpus == 1, config.model.family not in OF_ANY_SIZE
    stages = [2, 3] if is_cut and not is_one else [2]
    ways = [(none, offload, stage) for offload in (Offload.none, Offload.optimizer) for stage in stages]
    ways += [(none, Offload.parameters, 3)] if is_cut or is_one else []
    ways += [(nf4, Offload.none, 2), (nf4, Offload.optimizer, 2)]
    batches = micro_batch_sizes(config.trainer.global_batch_size, hardware.num_gpus)
    for (quantization, offload, stage), checkpointing, size in product(ways, (False, True), batches):
        changed = copy.deepcopy(config)
        changed.model.llm.quantization = quantization
        changed.trainer.offload, changed.trainer.zero_stage = offload, stage
        changed.trainer.gradient_checkpointing, changed.trainer.micro_batch_size = checkpointing, size
        yield Option(changed, total_bytes(memory_lines(changed, sizes, hardware, traces[checkpointing])))


def recommend(
    config: TrainConfig, sizes: WeightCounts, hardware: HardwareConfig, traces: dict[bool, Trace]
) -> Option | None:
    """The first of ``options`` that fits; None if none does.

    Raises:
        ValueError: the GPUs cannot share the global batch.
    """
    room = USABLE * hardware.gpu_memory_gb * GIB
    return next((option for option in options(config, sizes, hardware, traces) if option.bytes <= room), None)
