"""DeepSpeed, behind four verbs: the only file that imports it. The same engine on one CPU and on many GPUs."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it has looked for a GPU in vain
import deepspeed

from glus import distributed
from glus.batch import Batch, GlusOutput
from glus.config import BUCKET_NUMBERS, Offload, TrainerConfig


def init_distributed(timeout_minutes: float) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs; a process that no launcher started is a group of one.

    The SLURM variables are translated, so ``srun python scripts/train.py`` needs no launcher either.

    Args:
        timeout_minutes: a rank that waits longer for another one in a collective call fails.
    """
    if distributed.world_size() == 1 and "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())  # a group of one, beside others on the same machine
    for name, value in launcher_variables().items():
        os.environ.setdefault(name, value)
    distributed.use_device()
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # DeepSpeed tries the compiler, whose command lines nobody needs
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce for inference (a minute, and a compiler), unused here. On
        # GPUs it does not, and asking for its table would look for compilers of all its kernels.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        limit = timedelta(minutes=timeout_minutes)
        deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False, auto_mpi_discovery=False)
        # Its gradients and weights travel in a copy of the group, which it would make without the limit.
        deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=limit)
    logging.disable(disabled)


def leave_process_group(patience_seconds: float = 30.0) -> None:
    """Leave the group that ``init_distributed`` joined, if it did; NCCL warns of leaks where a program ends without.

    Args:
        patience_seconds: what the other ranks have to do the same, of which NCCL may wait for one that never comes: it
            failed, or this rank did. Then the program just ends.
    """

    if not dist.is_initialized():
        return

    def leave() -> None:
        distributed.use_device()  # a thread begins with GPU 0
        dist.destroy_process_group()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(patience_seconds)


def launcher_variables() -> dict[str, str]:
    """What torch and DeepSpeed read of a launcher; of these, a launcher's own count.

    DeepSpeed takes the local rank for the number of the GPU, which it is not where a task is shown its own GPU only.
    """
    gpu = distributed.device().index
    return {
        "RANK": str(distributed.rank()),
        "LOCAL_RANK": str(distributed.local_rank() if gpu is None else gpu),
        "WORLD_SIZE": str(distributed.world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OptimizerTensor(Enum):
    """What the optimizer holds of each trained parameter, float32 and of the parameter's shape.

    The value is AdamW's name of it; the master weight has none.
    """

    master = None
    exp_avg = "exp_avg"
    exp_avg_sq = "exp_avg_sq"


class Engine:
    """A model, its optimizer and its schedule, sharded by ZeRO.

    The optimizer's tensors can be read and written whole, parameter by parameter, whatever the number of processes and
    the ZeRO stage. That is what makes checkpoints elastic, with no more memory than one tensor and no conversion (as
    DeepSpeed's own universal checkpoints need, which also store the frozen weights).

    Args:
        model: its parameters with ``requires_grad`` are optimised.
        trainer: optimizer, schedule and ZeRO settings.
        accumulation: micro-batches per optimizer step.
    """

    def __init__(self, model: nn.Module, trainer: TrainerConfig, accumulation: int):
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        settings = (trainer.learning_rate, trainer.betas, trainer.weight_decay)
        self._adamw = build_adamw(self.trained.values(), *settings, fused=trainer.offload is not Offload.none)
        dtype = next(iter(self.trained.values())).dtype
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adamw, config=_deepspeed_config(trainer, accumulation, dtype)
        )
        self._adamw.register_step_pre_hook(self._drop_broken_gradients)
        self._zero_stage = trainer.zero_stage
        self._factor = warmup_decay(trainer.warmup_steps, trainer.steps)
        self._peak = trainer.learning_rate
        self._is_broken = False
        self._gradient_norms: list[list[tuple[str, torch.Tensor]]] = []
        for name, parameter in self.trained.items():
            parameter.register_hook(self._recorder(name))
        self._create_optimizer_state()

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return torch.device(self._engine.device)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last optimizer step's gradients, before clipping."""
        return float(self._engine.get_global_grad_norm())

    @property
    def is_discarded(self) -> bool:
        """Whether the last optimizer step was left out, because gradients were not finite; alike on all ranks."""
        return self._is_broken or bool(getattr(self._engine.optimizer, "overflow", False))

    def start_step(self, step: int) -> float:
        """Set and return the learning rate of optimizer step ``step`` (counted from 0), which it alone decides."""
        self._gradient_norms.clear()
        learning_rate = self._peak * self._factor(step)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def __call__(self, batch: Batch) -> GlusOutput:
        """The forward pass of a micro-batch that is already on ``device``."""
        self._gradient_norms.append([])
        return self._engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro-batch's share of the loss.

        The loss is divided by counts of the global batch already; DeepSpeed averages gradients over ranks, which the
        factor undoes, and must not divide by the accumulation steps. Where the loss is not finite, gradients become
        NaN for certain, on all ranks once they are summed: so all agree to discard the step, without asking.
        """
        certain = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
        self._engine.backward(loss * certain * distributed.world_size(), scale_wrt_gas=False)

    def step(self) -> None:
        """To be called after each micro-batch; the last one of an optimizer step updates the parameters.

        If gradients are not finite, they are dropped and nothing changes: ``is_discarded``. DeepSpeed looks for that
        by itself in its newest version alone, and not in every stage.
        """
        if self._engine.is_gradient_accumulation_boundary():
            self._is_broken = self._has_broken_gradients()
        self._engine.step()

    def _has_broken_gradients(self) -> bool:
        """Whether any gradient of the step is not finite, on any rank: a collective call, and the step's read-back.

        They are summed afterwards, which overflows nowhere: a norm above 2e19 counts as not finite, and a sum of some
        hundred that are below lies far from the largest numbers of float32 and bfloat16.
        """
        norms = [norm for norms in self._gradient_norms for _, norm in norms]
        values = torch.stack(norms) if norms else torch.zeros(0, device=self.device)
        num_broken = (~values.isfinite()).sum()
        dist.all_reduce(num_broken)
        return bool(num_broken)

    def _drop_broken_gradients(self, adamw: torch.optim.Optimizer, *_: object) -> None:
        """Before each step of AdamW, which leaves parameters without a gradient, and their moments, as they are."""
        if self._is_broken:
            for group in adamw.param_groups:
                for master in group["params"]:
                    master.grad = None

    def broken_gradients(self) -> list[list[str]]:
        """For each of this rank's micro-batches of the step, the parameters whose gradient was not finite."""
        return [[name for name, norm in norms if not math.isfinite(norm)] for norms in self._gradient_norms]

    @property
    def updates(self) -> int:
        """Optimizer steps that were taken: AdamW's own count, without those that were discarded."""
        return int(self._adamw.state[self._masters()[0]]["step"])

    def set_updates(self, count: int) -> None:
        """Let AdamW count on from there."""
        for master in self._masters():
            self._adamw.state[master]["step"].fill_(count)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters, by name."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.trained.items()}

    def read_tensors(self, kind: OptimizerTensor) -> Iterator[torch.Tensor]:
        """One tensor of each trained parameter, whole, in the order of ``shapes``.

        A collective call: every rank iterates to the end, at the same pace.
        """
        for parameter in self.trained.values():
            if kind.value is None:
                whole = deepspeed.utils.safe_get_full_fp32_param(parameter)
            else:
                whole = deepspeed.utils.safe_get_full_optimizer_state(parameter, kind.value)
            yield whole.detach()

    def write_tensors(self, kind: OptimizerTensor, read: Callable[[str], torch.Tensor]) -> None:
        """Replace one tensor of each trained parameter, and with the master weight the model's own.

        Args:
            kind: which one.
            read: gives it by the parameter's name, whole; every rank reads.
        """
        for name, parameter in self.trained.items():
            value = read(name).to(self.device)
            if kind.value is None:
                with deepspeed.zero.GatheredParameters([parameter], 0, enabled=self._zero_stage == 3), torch.no_grad():
                    parameter.copy_(value)
            if self._zero_stage == 3:
                self._write_shard(parameter, kind.value, value)
            elif kind.value is None:
                deepspeed.utils.safe_set_full_fp32_param(parameter, value)
            else:
                deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind.value)

    def _write_shard(self, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
        """ZeRO-3's share of this rank: equal parts, the last one padded (its own setter knows no padding)."""
        size = deepspeed.utils.safe_get_local_fp32_param(parameter).numel()
        padded = nn.functional.pad(value.flatten(), (0, size * distributed.world_size() - value.numel()))
        shard = padded.narrow(0, size * distributed.rank(), size)
        if key is None:
            deepspeed.utils.safe_set_local_fp32_param(parameter, shard)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, shard, key)

    def _masters(self) -> list[torch.Tensor]:
        """What AdamW updates: this rank's flat parts of float32 copies of the parameters."""
        if self._zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._adamw.param_groups for master in group["params"]]

    def _create_optimizer_state(self) -> None:
        """As AdamW itself would at the first step, so that it can be read and written from the beginning."""
        for master in self._masters():
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
            }
        if self._zero_stage == 2:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _recorder(self, name: str) -> Callable[[torch.Tensor], None]:
        def record(gradient: torch.Tensor) -> None:  # no synchronisation: the norm stays on the device
            self._gradient_norms[-1].append((name, torch.linalg.vector_norm(gradient, dtype=torch.float32)))

        return record


def _offload(offload: Offload) -> dict[str, Any]:
    parts = {Offload.none: [], Offload.optimizer: ["optimizer"], Offload.parameters: ["optimizer", "param"]}[offload]
    return {f"offload_{part}": {"device": "cpu", "pin_memory": torch.cuda.is_available()} for part in parts}


def _deepspeed_config(trainer: TrainerConfig, accumulation: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": trainer.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16, "check_grad_overflow": True},
        "zero_optimization": {
            "stage": trainer.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_NUMBERS,
            **_offload(trainer.offload),
        },
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, the same on CPU and GPU
        "zero_force_ds_cpu_optimizer": False,  # also where it is offloaded: DeepSpeed's own needs a compiler
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice per micro-batch
    }


def warmup_decay(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor of the peak learning rate at optimizer step 0, 1, ...: linear from 0 to 1, then linear to 0.

    The first step runs at rate 0 if there is a warm-up. (The released GLUS ran its first step at the full rate, an
    accident of its DeepSpeed version.)
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return factor


def build_adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: Sequence[float],
    weight_decay: float,
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW over the trained parameters.

    Args:
        parameters: these.
        learning_rate: until somebody sets another.
        betas: of the moments.
        weight_decay: decoupled.
        fused: one pass over the numbers; on one thread of a CPU five times faster. Where they lie on a GPU, AdamW's
            counts of steps must lie there too.
    """
    return torch.optim.AdamW(
        list(parameters), learning_rate, (betas[0], betas[1]), weight_decay=weight_decay, fused=fused or None
    )
