"""The objective: a table of terms, each a sum over the batch divided by a count of the whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from glus.batch import Batch, GlusOutput
from glus.config import LossConfig
from glus.losses.contrastive import ContrastiveQueue
from glus.types import ObjectKey

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


def mask_iou_error(predicted_R: torch.Tensor, iou_R: torch.Tensor) -> torch.Tensor:
    """Distance of the IoU that the mask decoder predicts from the reached one (SAM2's own training: L1).

    Args:
        predicted_R: in [0, 1], any float type.
        iou_R: in [0, 1].

    Returns:
        (R,) float32 in [0, 1].
    """
    return (predicted_R.float() - iou_R).abs()


def object_cross_entropy(logits_R: torch.Tensor, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Binary cross-entropy of the mask decoder's object score with whether there is an object (SAM2's own training).

    Args:
        logits_R: any float type.
        targets: masks of 0 or 1, (., H, W) each, R together.

    Returns:
        (R,) float32, >= 0.
    """
    is_there_R = torch.cat([(target > 0).flatten(1).any(1) for target in targets]).float()
    return F.binary_cross_entropy_with_logits(logits_R.float(), is_there_R, reduction="none")


@dataclass(frozen=True)
class LossInputs:
    """What the terms read: rows are (expression, query frame) pairs."""

    seg_logits_RV: torch.Tensor
    seg_id: int
    masks: list[tuple[torch.Tensor, torch.Tensor]]
    """(logits_RHW, target_RHW) per frame size of the batch; together R rows, in an order of their own."""
    iou_logits_R: torch.Tensor | None = None
    """What the model expects of the masks, in their order; None where it has no head for it."""
    mask_iou_R: torch.Tensor | None = None
    object_logits_R: torch.Tensor | None = None
    """What the mask decoder says of the masks, in their order."""


def _per_mask(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[LossInputs], torch.Tensor]:
    return lambda inputs: torch.cat([loss(logits, target) for logits, target in inputs.masks])


def _expected_iou(inputs: LossInputs) -> torch.Tensor:
    assert inputs.iou_logits_R is not None, "loss.weights.iou without model.iou_head"
    return iou_cross_entropy(inputs.iou_logits_R, torch.cat([mask_iou(*masks) for masks in inputs.masks]))


def _mask_iou(inputs: LossInputs) -> torch.Tensor:
    assert inputs.mask_iou_R is not None
    return mask_iou_error(inputs.mask_iou_R, torch.cat([mask_iou(*masks) for masks in inputs.masks]))


def _object_score(inputs: LossInputs) -> torch.Tensor:
    assert inputs.object_logits_R is not None
    return object_cross_entropy(inputs.object_logits_R, [target for _, target in inputs.masks])


TERMS: dict[str, Callable[[LossInputs], torch.Tensor]] = {
    "seg": lambda inputs: seg_cross_entropy(inputs.seg_logits_RV, inputs.seg_id),
    "bce": _per_mask(binary_cross_entropy),
    "dice": _per_mask(dice_loss),
    "iou": _expected_iou,
    "mask_iou": _mask_iou,
    "object_score": _object_score,
}
"""Name -> function giving one value per (expression, query frame). To add a loss: a line here and a weight."""


class GlusObjective:
    """Weighted sum of the terms and of the object contrastive loss, which alone has a state: its queue.

    Args:
        weights: term -> weight; names are those of ``TERMS`` and "contrastive".
        seg_id: id of [SEG].
        queue: of the contrastive loss; None if that has weight 0.
        temperature: of the contrastive loss.
        min_terms: fewer contrastive terms than this in the global batch count as none.

    Raises:
        ValueError: a weight names no term, or no weight is above 0.
    """

    def __init__(
        self,
        weights: dict[str, float],
        seg_id: int,
        queue: ContrastiveQueue | None = None,
        temperature: float = 0.07,
        min_terms: int = 1,
    ):
        unknown = sorted(set(weights) - set(TERMS) - {"contrastive"})
        if unknown:
            raise ValueError(f"loss.weights.{unknown[0]}: no such term; known are {', '.join([*TERMS, 'contrastive'])}")
        if weights.get("contrastive", 0) > 0 and queue is None:
            raise ValueError("loss.weights.contrastive > 0 needs a queue")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not self.weights:
            raise ValueError(f"loss.weights={weights}: at least one weight must be above 0")
        self.seg_id = seg_id
        self.queue = queue
        self.temperature = temperature
        self.min_terms = min_terms

    def counts(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Denominator of each term for the coming micro-batches of one optimizer step on this rank.

        Known before any forward pass, so that the sum over ranks can divide each micro-batch's loss.
        """
        counts: dict[str, float] = dict.fromkeys(self.weights, sum(batch.num_masks for batch in batches))
        if "contrastive" in self.weights and self.queue is not None:
            counts["contrastive"] = self.queue.count_terms([_flat_keys(batch) for batch in batches])
        return counts

    def __call__(
        self,
        output: GlusOutput,
        batch: Batch,
        denominators: dict[str, float],
        rng: np.random.Generator,
        first_sample: int = 0,
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of a micro-batch and their "total", float32 scalars.

        Args:
            output: of the model.
            batch: what it was given.
            denominators: ``counts`` of all micro-batches of the step, summed over ranks.
            rng: draws positives and negatives.
            first_sample: number of the batch's first sample, by which entries of the contrastive queue are ordered.
        """
        inputs = _inputs(output, batch, self.seg_id)
        terms = {}
        for name, weight in self.weights.items():
            if name in TERMS:
                terms[name] = weight * TERMS[name](inputs).sum() / denominators[name]
        if "contrastive" in self.weights and self.queue is not None:
            embeds_RC = output.seg_embeds_NQC.flatten(0, 1)
            losses = self.queue.loss(_flat_keys(batch), embeds_RC, self.temperature, rng, first_sample)
            enough = denominators["contrastive"] >= max(self.min_terms, 1)
            scale = self.weights["contrastive"] / denominators["contrastive"] if enough else 0.0
            terms["contrastive"] = losses.sum() * scale
        terms["total"] = torch.stack(list(terms.values())).sum()
        return terms


def _flat_keys(batch: Batch) -> list[ObjectKey]:
    return [key for keys in batch.object_keys for key in keys]


def _inputs(output: GlusOutput, batch: Batch, seg_id: int) -> LossInputs:
    by_size = _rows_by_size(batch)
    masks = [_resized_masks(output, batch, rows) for rows in by_size]
    order = [row for rows in by_size for row in rows]
    expected = (output.iou_logits_NQ, output.mask_iou_NQ, output.object_logits_NQ)
    in_order = (None if values is None else _of_rows(values, order).flatten() for values in expected)
    return LossInputs(output.seg_logits_NQV.flatten(0, 1), seg_id, masks, *in_order)


def _rows_by_size(batch: Batch) -> list[list[int]]:
    """Expressions with frames of the same size together."""
    rows: dict[torch.Size, list[int]] = {}
    for row, target in enumerate(batch.target_masks):
        rows.setdefault(target.shape[-2:], []).append(row)
    return list(rows.values())


def _resized_masks(output: GlusOutput, batch: Batch, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of expressions of one frame size, resized to it (bilinear, float32), beside the targets."""
    height, width = batch.target_masks[rows[0]].shape[-2:]
    logits = _of_rows(output.mask_logits_NQmm, rows).float()
    logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False).flatten(0, 1)
    return logits, torch.cat([batch.target_masks[row] for row in rows])


def _of_rows(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``values[rows]``, but a list of indices would be copied to the GPU, which waits for all it has to do."""
    return torch.stack([values[row] for row in rows])


def build_objective(config: LossConfig, seg_id: int) -> GlusObjective:
    """The objective of ``config``; the contrastive queue exists only if that loss has a weight.

    Raises:
        ValueError: a weight names no term.
    """
    contrastive = config.contrastive
    queue = None
    if config.weights.get("contrastive", 0) > 0:
        queue = ContrastiveQueue(
            contrastive.queue_size, contrastive.num_negatives, contrastive.datasets, contrastive.exclude_same_objects
        )
    return GlusObjective(config.weights, seg_id, queue, contrastive.temperature, contrastive.min_terms)
