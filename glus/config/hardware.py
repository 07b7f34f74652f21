"""The machine a run is meant for."""

from __future__ import annotations

from dataclasses import dataclass

from glus.config.loading import positive

PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A40": 150, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Card -> dense bfloat16 products with float32 sums in 1e12 floating-point operations per second, by its maker."""


def nominal_tflops(card: str) -> float | None:
    """``PEAK_TFLOPS`` of a card by its name as CUDA spells it; None: it is not listed, or a slice of one (MIG)."""
    words = set(card.replace("-", " ").split())
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words and "MIG" not in words]
    return float(PEAK_TFLOPS[max(known, key=len)]) if known else None


@dataclass
class HardwareConfig:
    """What ``tools/plan.py`` fits a run to. Training itself takes the processes it is started with, whatever their
    number here; the global batch is the same with any."""

    num_nodes: int = positive(default=1)
    num_gpus: int = positive(default=4)
    """On all nodes together: one process each."""
    gpu_memory_gb: float = positive(default=80.0)
    """Of one GPU, in units of 2**30 bytes."""
    node_memory_gb: float = positive(default=256.0)
    """Of one node, in the same unit: what offloading may fill."""
    peak_tflops: float = positive(default=312.0)
    """Of one GPU; see ``PEAK_TFLOPS``."""
