"""The machine a run is meant for."""

from __future__ import annotations

from dataclasses import dataclass

from glus.config.loading import require


@dataclass
class HardwareConfig:
    """What ``tools/plan.py`` fits a run to. Training itself takes the processes it is started with, whatever their
    number here; the global batch is the same with any."""

    num_nodes: int = 1
    num_gpus: int = 4
    """On all nodes together: one process each."""
    gpu_memory_gb: float = 80.0
    """Of one GPU, in units of 2**30 bytes."""
    node_memory_gb: float = 256.0
    """Of one node, in the same unit: what offloading may fill."""
    peak_tflops: float = 312.0
    """Dense bfloat16 products of one GPU in 1e12 floating-point operations per second, by its maker (A100: 312,
    RTX 4090: 165, H100 SXM: 989)."""

    def __post_init__(self) -> None:
        for name in ("num_nodes", "num_gpus", "gpu_memory_gb", "node_memory_gb", "peak_tflops"):
            require(getattr(self, name) > 0, f"hardware.{name}", "a positive number", getattr(self, name))
        expected = f"a multiple of hardware.num_nodes={self.num_nodes}"
        require(self.num_gpus % self.num_nodes == 0, "hardware.num_gpus", expected, self.num_gpus)
