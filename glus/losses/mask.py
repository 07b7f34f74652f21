"""Losses of masks at the frames' own resolution, in float32, one value per mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DICE_SCALE = 1000.0
DICE_EPSILON = 1e-6
"""LISA's constants (its dice_loss), kept by the released GLUS."""


def binary_cross_entropy(logits_RHW: torch.Tensor, target_RHW: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy over the pixels of each mask.

    Args:
        logits_RHW: any float type.
        target_RHW: 0 or 1.

    Returns:
        (R,) float32, >= 0.
    """
    losses = F.binary_cross_entropy_with_logits(logits_RHW.float(), target_RHW.float(), reduction="none")
    return losses.flatten(1).mean(1)


def dice_loss(logits_RHW: torch.Tensor, target_RHW: torch.Tensor) -> torch.Tensor:
    """One minus the soft Dice coefficient of each mask.

    ``1 - (2 * sum(p t / 1000) + 1e-6) / (sum(p / 1000) + sum(t / 1000) + 1e-6)`` with ``p = sigmoid(logit)``; finite
    for empty targets.

    Args:
        logits_RHW: any float type.
        target_RHW: 0 or 1.

    Returns:
        (R,) float32 in [0, 1].
    """
    probability = logits_RHW.float().sigmoid().flatten(1)
    target = target_RHW.float().flatten(1)
    overlap = 2 * (probability / DICE_SCALE * target).sum(1)
    total = (probability / DICE_SCALE).sum(1) + (target / DICE_SCALE).sum(1)
    return 1 - (overlap + DICE_EPSILON) / (total + DICE_EPSILON)
