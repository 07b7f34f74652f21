"""The machine a run is meant for."""

from __future__ import annotations

from dataclasses import dataclass

from glus.config.loading import require

PEAK_TFLOPS = {
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 150.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 5090": 210.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Card -> dense bfloat16 products with float32 sums in 1e12 floating-point operations per second, by its maker."""


def nominal_tflops(card: str) -> float | None:
    """``PEAK_TFLOPS`` of a card by its name as CUDA spells it; None: it is not listed, or a slice of one (MIG)."""
    words = set(card.replace("-", " ").split())
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words and "MIG" not in words]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


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
    """Of one GPU; see ``PEAK_TFLOPS``."""

    def __post_init__(self) -> None:
        for name in ("num_nodes", "num_gpus", "gpu_memory_gb", "node_memory_gb", "peak_tflops"):
            require(getattr(self, name) > 0, f"hardware.{name}", "a positive number", getattr(self, name))
        expected = f"a multiple of hardware.num_nodes={self.num_nodes}"
        require(self.num_gpus % self.num_nodes == 0, "hardware.num_gpus", expected, self.num_gpus)
