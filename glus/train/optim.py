"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn


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
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: Sequence[float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trained parameters."""
    return torch.optim.AdamW(
        list(parameters), lr=learning_rate, betas=(betas[0], betas[1]), weight_decay=weight_decay
    )
