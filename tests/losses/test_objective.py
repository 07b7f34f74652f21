"""The table of terms: weights, denominators, and splits that change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from glus.batch import Batch, GlusOutput
from glus.config import ContrastiveConfig, LossConfig
from glus.losses.contrastive import ContrastiveQueue
from glus.losses.objective import (
    TERMS,
    GlusObjective,
    LossInputs,
    binary_cross_entropy,
    build_objective,
    dice_loss,
    seg_cross_entropy,
)
from tests.losses.conftest import CaseMaker

WEIGHTS = {"seg": 1.0, "bce": 2.0, "dice": 0.5}


def _run(objective: GlusObjective, batch: Batch, output: GlusOutput) -> dict[str, torch.Tensor]:
    return objective(output, batch, objective.counts([batch]), np.random.default_rng(0))


def _split(batch: Batch, output: GlusOutput, row: int) -> tuple[Batch, GlusOutput]:
    """One expression as a micro-batch of its own."""
    one = replace(
        batch,
        rows=replace(batch.rows, reads_R=batch.rows.reads_R[:2]),
        target_masks=[batch.target_masks[row]],
        object_keys=[batch.object_keys[row]],
    )
    return one, GlusOutput(*(None if value is None else value[[row]] for value in output))


def test_terms_are_weighted_means_over_all_masks_of_mixed_sizes(make_case: CaseMaker) -> None:
    batch, output = make_case(((9, 7), (12, 5), (9, 7)))
    terms = _run(GlusObjective(WEIGHTS, seg_id=3), batch, output)
    bce, dice = [], []
    for row, target in enumerate(batch.target_masks):
        for q in range(2):
            logits = torch.nn.functional.interpolate(
                output.mask_logits_NQmm[row, q][None, None], target.shape[1:], mode="bilinear", align_corners=False
            )[0]
            bce.append(binary_cross_entropy(logits, target[[q]]))
            dice.append(dice_loss(logits, target[[q]]))
    seg = seg_cross_entropy(output.seg_logits_NQV.flatten(0, 1), 3)
    expected = {
        "seg": seg.mean(),
        "bce": 2 * torch.cat(bce).mean(),
        "dice": 0.5 * torch.cat(dice).mean(),
    }
    assert terms.keys() == {*expected, "total"}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["total"], sum(expected.values()))


def test_a_weight_of_zero_removes_its_term(make_case: CaseMaker) -> None:
    batch, output = make_case()
    terms = _run(GlusObjective({**WEIGHTS, "dice": 0.0, "contrastive": 0.0}, seg_id=3), batch, output)
    assert terms.keys() == {"seg", "bce", "total"}


def test_the_iou_term_compares_each_expectation_with_its_own_mask(make_case: CaseMaker) -> None:
    """Expressions of one frame size are computed together, so that their order changes on the way."""
    batch, output = make_case(((9, 7), (12, 5), (9, 7)))
    output = output._replace(iou_logits_NQ=torch.arange(-3.0, 3.0).view(3, 2).requires_grad_())
    terms = _run(GlusObjective({"iou": 0.1}, seg_id=3), batch, output)
    expected = []
    for row, target in enumerate(batch.target_masks):
        for q in range(2):
            mask = torch.nn.functional.interpolate(
                output.mask_logits_NQmm[row, q][None, None], target.shape[1:], mode="bilinear", align_corners=False
            )[0, 0]
            iou = float(((mask > 0) & (target[q] > 0)).sum() / ((mask > 0) | (target[q] > 0)).sum())
            p = torch.sigmoid(output.iou_logits_NQ[row, q]).item()
            expected.append(-(iou * math.log(p) + (1 - iou) * math.log(1 - p)))
    assert terms["total"].item() == pytest.approx(0.1 * float(np.mean(expected)), rel=1e-5)
    assert torch.autograd.grad(terms["total"], output.mask_logits_NQmm, allow_unused=True) == (None,)


def test_unknown_and_useless_weights_are_errors() -> None:
    with pytest.raises(
        ValueError,
        match=r"loss\.weights\.focal: no such term; known are seg, bce, dice, iou, mask_iou, object",
    ):
        GlusObjective({"seg": 1.0, "focal": 1.0}, seg_id=3)
    with pytest.raises(ValueError, match="above 0"):
        GlusObjective({"seg": 0.0}, seg_id=3)
    with pytest.raises(ValueError, match="needs a queue"):
        GlusObjective({"contrastive": 0.1}, seg_id=3)


def test_micro_batches_add_up_to_the_whole_in_loss_and_gradient(make_case: CaseMaker) -> None:
    batch, output = make_case(((9, 7), (12, 5), (9, 7), (4, 4)))
    objective = GlusObjective(WEIGHTS, seg_id=3)
    leaves = [output.seg_logits_NQV, output.mask_logits_NQmm]
    whole = _run(objective, batch, output)["total"]
    expected = torch.autograd.grad(whole, leaves)
    pieces = [_split(batch, output, row) for row in range(4)]
    denominators = objective.counts([piece for piece, _ in pieces])
    assert denominators == dict.fromkeys(WEIGHTS, 8)
    total = sum(objective(out, piece, denominators, np.random.default_rng(0))["total"] for piece, out in pieces)
    assert float(total.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    for gradient, wanted in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)


def _contrastive(num_negatives: int = 2, min_terms: int = 1) -> GlusObjective:
    config = LossConfig(
        weights={"contrastive": 0.1}, contrastive=ContrastiveConfig(num_negatives=num_negatives, min_terms=min_terms)
    )
    return build_objective(config, seg_id=3)


def test_the_contrastive_term_is_a_mean_over_the_terms_of_all_micro_batches(make_case: CaseMaker) -> None:
    cases = [make_case(((5, 5),) * 3, seed=seed, video=f"v{seed}") for seed in range(3)]
    objective, queue = _contrastive(), ContrastiveQueue(512, 2)
    denominators = objective.counts([batch for batch, _ in cases])
    assert denominators["contrastive"] == 18  # each of 6 rows has 2 positives, and 2 negatives at the other frame
    rng, losses = np.random.default_rng(1), []
    for batch, output in cases:
        keys = [key for keys in batch.object_keys for key in keys]
        losses.append(queue.loss(keys, output.seg_embeds_NQC.flatten(0, 1), 0.07, rng))
    rng = np.random.default_rng(1)
    total = sum(objective(output, batch, denominators, rng)["contrastive"] for batch, output in cases)
    torch.testing.assert_close(total, 0.1 * torch.cat(losses).mean())


@pytest.mark.parametrize(("num_negatives", "min_terms"), [(100, 1), (2, 7)])
def test_too_few_contrastive_terms_count_as_none(make_case: CaseMaker, num_negatives: int, min_terms: int) -> None:
    batch, output = make_case(((5, 5),) * 3)
    objective = _contrastive(num_negatives, min_terms)
    terms = _run(objective, batch, output)
    assert float(terms["contrastive"].detach()) == 0
    assert float(terms["total"].detach()) == 0
    assert objective.queue is not None
    assert len(objective.queue.entries) == 6  # the queue fills all the same


def test_the_defaults_are_the_published_weights_and_every_term_is_named() -> None:
    objective = build_objective(LossConfig(), seg_id=3)
    assert objective.weights == {"seg": 1.0, "bce": 2.0, "dice": 0.5, "contrastive": 0.1}
    assert {*TERMS, "contrastive"} == LossConfig().weights.keys()
    assert objective.queue is not None
    assert build_objective(LossConfig(weights={"seg": 1.0}), seg_id=3).queue is None


def test_sam2s_own_losses_judge_what_its_decoder_says() -> None:
    """L1 to the reached IoU, and whether there is an object at all; rows in the order of the masks."""
    target = torch.zeros(2, 4, 4, dtype=torch.uint8)
    target[0, :2] = 1
    logits = torch.where(torch.arange(4)[:, None] < 1, 1.0, -1.0).expand(2, 4, 4)  # half of the first; no object
    inputs = LossInputs(
        torch.zeros(2, 3), 0, [(logits[:1], target[:1]), (logits[1:], target[1:])], None,
        mask_iou_R=torch.tensor([0.75, 0.25]), object_logits_R=torch.tensor([2.0, 2.0]),
    )  # fmt: skip
    torch.testing.assert_close(TERMS["mask_iou"](inputs), torch.tensor([0.25, 0.25]))
    expected = torch.tensor([-math.log(1 / (1 + math.exp(-2))), -math.log(1 - 1 / (1 + math.exp(-2)))])
    torch.testing.assert_close(TERMS["object_score"](inputs), expected)
