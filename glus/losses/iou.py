"""What the IoU head learns: how well the model's own mask fits, in float32, one value per mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
