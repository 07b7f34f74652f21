"""Which settings to train with on a machine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from glus.config import HardwareConfig, Offload, Quantization, TrainConfig
from glus.train.plan.memory import GIB, Sizes, memory_lines, total_bytes
from glus.train.plan.trace import Trace

USABLE = 0.94
"""Share of a GPU's memory that a plan may fill; the driver keeps some."""
MAX_MICRO_BATCH = 10
"""Videos; a GPU is busy long before."""


@dataclass(frozen=True)
class Option:
    """One way to train."""

    quantization: Quantization
    offload: Offload
    zero_stage: int
    gradient_checkpointing: bool
    micro_batch_size: int
    bytes: float
    """Per GPU."""

    def overrides(self) -> str:
        """What to put on the command line."""
        words = [
            f"trainer.zero_stage={self.zero_stage}",
            f"trainer.micro_batch_size={self.micro_batch_size}",
            f"trainer.gradient_checkpointing={str(self.gradient_checkpointing).lower()}",
            f"trainer.offload={self.offload.value}",
            f"model.llm.quantization={self.quantization.value}",
        ]
        return " ".join(words)


def apply(config: TrainConfig, option: Option) -> TrainConfig:
    """A copy of the config with an option's settings."""
    changed = copy.deepcopy(config)
    changed.model.llm.quantization = option.quantization
    for name in ("offload", "zero_stage", "gradient_checkpointing", "micro_batch_size"):
        setattr(changed.trainer, name, getattr(option, name))
    return changed


def micro_batches(global_batch_size: int, num_gpus: int) -> list[int]:
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


def options(config: TrainConfig, sizes: Sizes, hardware: HardwareConfig, traces: dict[bool, Trace]) -> Iterator[Option]:
    """All ways to train, the best first, whether they fit or not.

    What changes no number comes before what does (quantisation); what slows least comes first: no offloading, no
    recomputing, stage 2 (whose traffic is that of plain data parallelism, so that stage 0 never gains) before stage 3,
    large micro-batches.

    Args:
        config: of the run; its global batch is kept.
        sizes: of its network.
        hardware: the machine.
        traces: of a micro-batch of one video, without and with gradient checkpointing.
    """
    stages = [2, 3] if hardware.num_gpus > 1 else [2]
    ways = [(Quantization.none, Offload.none, stage) for stage in stages]
    ways += [(Quantization.none, Offload.optimizer, stage) for stage in stages]
    ways += [(Quantization.none, Offload.parameters, 3), (Quantization.nf4, Offload.none, 2)]
    ways += [(Quantization.nf4, Offload.optimizer, 2)]
    for quantization, offload, stage in ways:
        for checkpointing in (False, True):
            for size in micro_batches(config.trainer.global_batch_size, hardware.num_gpus):
                option = Option(quantization, offload, stage, checkpointing, size, 0.0)
                lines = memory_lines(apply(config, option), sizes, hardware, traces[checkpointing])
                yield Option(quantization, offload, stage, checkpointing, size, total_bytes(lines))


def recommend(config: TrainConfig, sizes: Sizes, hardware: HardwareConfig, traces: dict[bool, Trace]) -> Option | None:
    """The first of ``options`` that fits; None if none does.

    Raises:
        ValueError: the GPUs cannot share the global batch.
    """
    room = USABLE * hardware.gpu_memory_gb * GIB
    return next((option for option in options(config, sizes, hardware, traces) if option.bytes <= room), None)
