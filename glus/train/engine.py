"""DeepSpeed, behind four verbs: the only file that imports it. The same engine on one CPU and on many GPUs."""

from __future__ import annotations

import os
import socket
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from glus import distributed
from glus.config import Offload, TrainerConfig
from glus.structures import Batch, GlusOutput
from glus.train.optim import build_adamw, warmup_decay


def init_distributed() -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs; a process that no launcher started is a group of one.

    The SLURM variables are translated, so ``srun python scripts/train.py`` needs no launcher either.
    """
    if distributed.world_size() == 1 and "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())  # a group of one, beside others on the same machine
    os.environ.setdefault("RANK", str(distributed.rank()))
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))
    os.environ.setdefault("WORLD_SIZE", str(distributed.world_size()))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.local_rank())
    # On CPUs DeepSpeed would compile a shared-memory all-reduce for inference (a minute, and a compiler), unused here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    """A model, its optimizer and its schedule, sharded by ZeRO.

    Args:
        model: its parameters with ``requires_grad`` are optimised.
        trainer: optimizer, schedule and ZeRO settings.
        accumulation: micro-batches per optimizer step.
    """

    def __init__(self, model: nn.Module, trainer: TrainerConfig, accumulation: int):
        self.model = model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = build_adamw(parameters, trainer.learning_rate, trainer.betas, trainer.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_decay(trainer.warmup_steps, trainer.steps))
        self._engine, _, _, self._schedule = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=_deepspeed_config(trainer, accumulation, next(iter(parameters)).dtype),
        )
        self._zero_stage = trainer.zero_stage
        self._grad_norm = torch.zeros(())

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return torch.device(self._engine.device)

    @property
    def learning_rate(self) -> float:
        """Of the coming optimizer step."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last optimizer step's gradients, before clipping."""
        return float(self._engine.get_global_grad_norm() if self._zero_stage else self._grad_norm)

    def __call__(self, batch: Batch) -> GlusOutput:
        """The forward pass of a micro-batch that is already on ``device``."""
        return self._engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro-batch's share of the loss.

        The loss is divided by counts of the global batch already; DeepSpeed averages gradients over ranks, which the
        factor undoes, and must not divide by the accumulation steps.
        """
        self._engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)

    def step(self) -> None:
        """To be called after each micro-batch; the last one of an optimizer step updates the parameters."""
        if self._zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            # Without ZeRO, DeepSpeed clips float32 gradients but does not tell their norm.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._grad_norm = nn.utils.get_total_norm(gradients)
        self._engine.step()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, whole, on the CPU. A collective call: every rank makes it."""
        sharded = list(self.model.parameters()) if self._zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            return {
                name: parameter.detach().cpu().clone()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }


def _offload(offload: Offload) -> dict[str, Any]:
    parts = {Offload.none: [], Offload.optimizer: ["optimizer"], Offload.parameters: ["optimizer", "param"]}[offload]
    return {f"offload_{part}": {"device": "cpu", "pin_memory": torch.cuda.is_available()} for part in parts}


def _deepspeed_config(trainer: TrainerConfig, accumulation: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": trainer.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": trainer.zero_stage, "overlap_comm": False, **_offload(trainer.offload)},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, the same on CPU and GPU
        "zero_force_ds_cpu_optimizer": False,  # also where it is offloaded: DeepSpeed's own needs a compiler
        "steps_per_print": 10**9,
    }
