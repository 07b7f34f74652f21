"""The terms of the objective as pure functions: of the [SEG] token, of masks at the frames' own resolution, of the IoU
head. In float32, one value per [SEG] or mask."""

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


def seg_cross_entropy(logits_RV: torch.Tensor, seg_id: int) -> torch.Tensor:
    """Negative log-likelihood of [SEG] at each position that is to predict it.

    The released GLUS takes its language loss only at the positions before [SEG] (llava_llama.py:110-127), so no
    label masking and no logits elsewhere are needed.

    Args:
        logits_RV: vocabulary logits at those positions, any float type.
        seg_id: id of [SEG].

    Returns:
        (R,) float32, >= 0.
    """
    target_R = torch.full((len(logits_RV),), seg_id, device=logits_RV.device)
    return F.cross_entropy(logits_RV.float(), target_R, reduction="none")


def mask_iou(logits_RHW: torch.Tensor, target_RHW: torch.Tensor) -> torch.Tensor:
    """Intersection over union of predicted masks (logits > 0) with the truth.

    Args:
        logits_RHW: any float type.
        target_RHW: 0 or 1.

    Returns:
        (R,) float32 in [0, 1] without gradient; 1 where both are empty, as J is defined.
    """
    predicted, target = logits_RHW.detach() > 0, target_RHW > 0
    intersection = (predicted & target).flatten(1).sum(1).float()
    union = (predicted | target).flatten(1).sum(1).float()
    return torch.where(union > 0, intersection / union, torch.ones_like(union))


def iou_cross_entropy(iou_logits_R: torch.Tensor, iou_R: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the expected IoU with the reached one.

    Its minimum is the mean of the IoUs that follow on a state, where an L1 loss would give their median (the paper's
    key-frame selector has L1, ours only ranks frames).

    Args:
        iou_logits_R: any float type.
        iou_R: in [0, 1].

    Returns:
        (R,) float32, >= 0.
    """
    return F.binary_cross_entropy_with_logits(iou_logits_R.float(), iou_R.float(), reduction="none")
