"""Time, memory and peak speed of a device."""

from __future__ import annotations

import resource
import time

import torch

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the matrices whose product stands for the machine's peak."""


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """GPU memory since the last reset; on a CPU the process's largest so far, which never falls."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
