"""Arrays on their way to the model's device, and flags on their way back, without waiting for it."""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array there; to a GPU through page-locked memory, from which it is copied while other work goes on."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # copies where it must
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(flags: torch.Tensor) -> torch.Tensor:
    """A bool tensor that will be complete on the CPU once the device has done what it was given to do until now."""
    if flags.device.type != "cuda":
        return flags
    return torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
