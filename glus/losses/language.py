"""Cross-entropy of the [SEG] token."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
