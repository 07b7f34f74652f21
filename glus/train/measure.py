"""Time, memory and peak speed of a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the matrices whose product stands for the machine's peak."""


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes since ``forget_peak``: of the GPU's allocations, or resident in this process (Linux).

    Not ``getrusage``'s: that one a process inherits from the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def forget_peak(device: torch.device) -> None:
    """Count the peak from now on, so that importing, loading and other measurements do not hide it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of ten products of two large matrices, in 10^12 operations a second."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        before = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * side**3 / best / 1e12


def count_operations() -> FlopCounterMode:
    """A context in which torch counts operations, those of attention as ``attention_counts`` does."""
    return FlopCounterMode(display=False, custom_mapping=attention_counts())


def attention_counts() -> dict[Any, Callable[..., int]]:
    """Kernel of attention, forwards or backwards -> what counts its operations, given its arguments, tensors as shapes.

    Causal attention counts half of the square, since kernels leave out what is hidden. The CPU's kernel, which torch
    does not count, is among them.
    """
    kernels = [
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention{ending}")
        for name, ending in product(("flash", "efficient"), ("", "_backward"))
    ]
    kernels += [
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward")
    ]
    return {kernel: _attention_count(kernel) for kernel in kernels}


def _attention_count(kernel: Any) -> Callable[..., int]:
    names = [argument.name for argument in kernel.default._schema.arguments]
    count, number = (sdpa_flop_count, 3) if names[0] == "query" else (sdpa_backward_flop_count, 4)
    causal = names.index("is_causal")

    def operations(*arguments: Any, **options: Any) -> int:
        is_causal = arguments[causal] if len(arguments) > causal else options.get("is_causal", False)
        return count(*arguments[:number]) // (2 if is_causal else 1)

    return operations
