"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

BUCKET_NUMBERS = 15 * 10**7
"""Gradients are summed over ranks through a buffer of so many numbers: the whole embedding table of LLaMA (1.3e8) fits,
and all that is trained with it (2.9e8) does not, so that summing begins while the backward pass is still at work."""


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
