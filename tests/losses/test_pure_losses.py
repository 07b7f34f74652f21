"""The [SEG] cross-entropy, binary cross-entropy and Dice against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from glus.losses.objective import binary_cross_entropy, dice_loss, iou_cross_entropy, mask_iou, seg_cross_entropy


def _masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5, 6, generator=generator)
    return logits, torch.randint(0, 2, (4, 5, 6), dtype=torch.uint8, generator=generator)


def test_seg_cross_entropy_is_the_negative_log_softmax() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    expected = [math.log(sum(math.exp(value) for value in row)) - row[3] for row in logits.tolist()]
    torch.testing.assert_close(seg_cross_entropy(logits, 3), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_binary_cross_entropy_is_the_mean_over_a_masks_pixels() -> None:
    logits, target = _masks()
    expected = []
    for mask, truth in zip(logits.tolist(), target.tolist(), strict=True):
        pairs = [(x, t) for xs, ts in zip(mask, truth, strict=True) for x, t in zip(xs, ts, strict=True)]
        expected.append(sum(math.log(1 + math.exp(-x)) + (1 - t) * x for x, t in pairs) / len(pairs))
    torch.testing.assert_close(binary_cross_entropy(logits, target), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_dice_is_the_soft_overlap_with_lisas_constants() -> None:
    logits, target = _masks()
    p, t = torch.sigmoid(logits.double()).flatten(1), target.double().flatten(1)
    overlap, total = 2 * (p * t / 1000).sum(1), (p / 1000).sum(1) + (t / 1000).sum(1)
    expected = 1 - (overlap + 1e-6) / (total + 1e-6)
    torch.testing.assert_close(dice_loss(logits, target).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 80.0])
@pytest.mark.parametrize("fill", [0, 1])
def test_losses_and_gradients_stay_finite_on_empty_and_full_masks(scale: float, fill: int) -> None:
    target = torch.full((2, 5, 6), fill, dtype=torch.uint8)
    logits = (scale * torch.stack([torch.ones(5, 6), -torch.ones(5, 6)])).requires_grad_()
    for loss in (binary_cross_entropy, dice_loss):
        values = loss(logits, target)
        assert torch.isfinite(values).all()
        assert values.argmin() == (0 if fill else 1)
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert torch.isfinite(gradient).all()
    assert dice_loss(torch.full((1, 5, 6), -80.0), torch.zeros(1, 5, 6)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [binary_cross_entropy, dice_loss])
def test_low_precision_logits_give_float32_losses(loss: object) -> None:
    logits, target = _masks()
    low = logits.to(torch.bfloat16)
    assert callable(loss)
    assert loss(low, target).dtype is torch.float32
    assert torch.equal(loss(low, target), loss(low.float(), target))
    seg = seg_cross_entropy(low.flatten(1), 2)
    assert torch.equal(seg, seg_cross_entropy(low.flatten(1).float(), 2))


def test_mask_iou_counts_pixels_and_is_1_where_nothing_is_and_nothing_is_found() -> None:
    logits = torch.tensor([[[1.0, 2.0, -1.0]], [[-1.0, 0.0, -3.0]], [[-1.0, -1.0, -1.0]], [[1.0, -1.0, -1.0]]])
    target = torch.tensor([[[0, 1, 1]], [[0, 0, 0]], [[1, 0, 0]], [[1, 0, 0]]], dtype=torch.uint8)
    assert mask_iou(logits, target).tolist() == [pytest.approx(1 / 3), 1, 0, 1]
    assert not mask_iou(logits.requires_grad_(), target).requires_grad


def test_iou_cross_entropy_is_least_where_the_expectation_is_right() -> None:
    iou = torch.tensor([0.0, 0.3, 1.0])
    logits = torch.linspace(-6, 6, 2001)
    for value in iou:
        losses = iou_cross_entropy(logits, value.expand(len(logits)))
        assert torch.sigmoid(logits[losses.argmin()]).item() == pytest.approx(value.item(), abs=0.01)
    assert iou_cross_entropy(torch.zeros(1, dtype=torch.bfloat16), iou[:1]).item() == pytest.approx(math.log(2))
