"""One optimizer for all towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

WARMUP_STEPS = 60
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.98), 0.01, 1.0

Report = Callable[[int, dict[str, float]], None]
"""``report(step, values)`` gets the values of every step."""


class TowerOptimizer:
    """AdamW with warm-up, plateau and decay, and clipped gradients.

    Args:
        modules: all of whose parameters are trained.
        learning_rate: of the plateau.
        steps: ``update`` calls to come.
    """

    def __init__(self, modules: Iterable[nn.Module], learning_rate: float, steps: int):
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.adamw = torch.optim.AdamW(self.parameters, learning_rate, BETAS, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, warmup_hold_decay(WARMUP_STEPS, steps))

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient of ``loss``."""
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.adamw.step()
        self.schedule.step()


def warmup_hold_decay(warmup_steps: int, total_steps: int, decay_share: float = 0.3) -> Callable[[int], float]:
    """Factor of the peak: linear from 0, then 1, then linear to 0 over the last ``decay_share`` of the steps.

    What happens before the decay does not depend on how long the run will be.
    """
    decay_steps = max(1, round(decay_share * total_steps))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup_steps, (total_steps - step) / decay_steps)

    return factor
