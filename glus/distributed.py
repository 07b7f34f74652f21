"""Rank, world size, and the seeded random generators that make a sample a pure function of its number."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads about CUDA's memory when it first takes some: the first name, or in older versions the second."""
_PLAIN_ERRORS = (FileNotFoundError, OSError, ValueError, RuntimeError)
"""What rank 0's error is to the other ranks, which may not be able to make it: the first kind that it is of."""
LARGE_MODEL = 10**9
"""Parameters of an LLM that nobody runs on a CPU unless on purpose."""
_STATUS = Path("/proc/self/status")
"""Of this process, on Linux."""
Result = TypeVar("Result")


def rank() -> int:
    """This process's number among all processes, also before the process group exists (torchrun, SLURM)."""
    if _in_group():
        return dist.get_rank()
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size() -> int:
    """Number of processes that share the work."""
    if _in_group():
        return dist.get_world_size()
    # Of the job step (srun), not SLURM_NTASKS: a program that sbatch runs without srun is one process, not many.
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def local_rank() -> int:
    """This process's number on its own machine, and its GPU's, unless it is shown that one alone (see ``device``)."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())  # srun may show a task its own GPU only


def device_name() -> str:
    """Of the GPU of this process, as CUDA spells it, or CPU."""
    return torch.cuda.get_device_name(device()) if torch.cuda.is_available() else "CPU"


def peak_memory_gib() -> float:
    """The most that this process has held: of its GPU's memory, or without a GPU of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device()) / 2**30
    if _STATUS.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return int(peak[1]) / 2**20  # getrusage's a process inherits from the one that started it
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def use_device() -> torch.device:
    """The device of this process; a GPU becomes the one that streams and memory are of where none is named.

    Micro-batches and prompts have many lengths. So memory grows in segments that fit any of them (unless the
    environment says how it should), and attention is left to kernels that need no plan per shape: cuDNN, which torch
    prefers on H100 and newer, makes one in about half a second, per thread.
    """
    chosen = device()
    if chosen.type == "cuda":
        if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
            os.environ |= dict.fromkeys(ALLOCATOR_VARIABLES, "expandable_segments:True")
        torch.cuda.set_device(chosen)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return chosen


def check_size(num_parameters: int, allow_cpu: bool) -> None:
    """Refuse to run a large model on the CPU unless somebody asks for it.

    A GPU that torch cannot use, for instance because its driver is too old, is as good as none, and says so by a
    warning alone.

    Args:
        num_parameters: of the LLM.
        allow_cpu: somebody asks for it.

    Raises:
        ValueError: no GPU is usable.
    """
    if num_parameters >= LARGE_MODEL and not allow_cpu and device().type == "cpu":
        raise ValueError(
            f"no usable GPU, and an LLM of {num_parameters / 1e9:.1f} billion parameters is not started on the CPU by "
            "accident: python tools/doctor.py says what is wrong with the GPU and what to do; allow_cpu=true "
            "(segment_video.py: --allow-cpu) starts it on the CPU all the same (minutes for a step or a short video)"
        )


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on ``key`` alone, equal on every machine, rank and worker."""
    return np.random.default_rng(np.random.SeedSequence(key))


def sum_over_ranks(values: dict[str, float], where: torch.device | str = "cpu") -> dict[str, float]:
    """The sum of each value over all ranks; every rank passes the same keys."""
    if not _in_group() or dist.get_world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=where)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def gather(value: Result) -> list[Result]:
    """The value of each rank, in their order, on every rank."""
    if not _in_group() or dist.get_world_size() == 1:
        return [value]
    values: list[Result | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all are filled


def on_main(function: Callable[[], Result]) -> Result:
    """The result of ``function``, which rank 0 alone calls, on every rank; a process without a group calls it itself.

    Raises:
        Exception: what ``function`` raised, so that no rank waits for the others in vain; on the others a plain error
            of the same kind with its text, since not every error can be pickled.
    """
    if not _in_group():
        return function()
    if rank() != 0:
        outcome: Result | Exception = gather(None)[0]  # type: ignore[assignment]  # rank 0's
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    try:
        result = function()
    except Exception as error:  # swallows nothing: the others, who would wait in vain, get it too, and it goes on
        kind = next((kind for kind in _PLAIN_ERRORS if isinstance(error, kind)), None)
        gather(kind(str(error)) if kind else RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    gather(result)
    return result


def broadcast(tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor of any type with rank 0's values, on every rank; without a group nothing happens.

    Returns when it has happened: ranks that ran ahead would begin to wait, and to time out, for many at once.
    """
    if not _in_group() or dist.get_world_size() == 1:
        return
    assert tensor.is_contiguous()  # or the flattened values would be a copy
    values = tensor.detach().flatten().view(torch.uint8)  # not every backend knows every type
    sent = values.to(device())  # NCCL knows GPUs only
    dist.broadcast(sent, 0)
    if sent is not values:
        values.copy_(sent)
    if sent.is_cuda:
        torch.cuda.synchronize(sent.device)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
