"""Object contrastive loss and its queue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glus.losses.contrastive import ContrastiveQueue, object_contrastive_loss
from glus.types import ObjectKey


def _key(
    exp_id: int, frame: int, objects: tuple[int, ...] = (1,), video: str = "v", dataset: str = "mevis"
) -> ObjectKey:
    return ObjectKey(dataset, video, str(exp_id), str(frame), frozenset(objects))


def _naive(anchor: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor, temperature: float) -> float:
    def similarity(other: torch.Tensor) -> float:
        return float(anchor @ other / (anchor.norm() * other.norm())) / temperature

    top = math.exp(similarity(positive))
    return -math.log(top / (top + sum(math.exp(similarity(other)) for other in negatives)))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_loss_is_info_nce_over_cosines(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, positive = (3 * torch.randn(4, 8, generator=generator) for _ in range(2))
    negative = torch.randn(4, 16, 8, generator=generator)
    losses = object_contrastive_loss(anchor, positive, negative, temperature)
    rows = zip(anchor.double(), positive.double(), negative.double(), strict=True)
    expected = [_naive(*row, temperature) for row in rows]
    torch.testing.assert_close(losses.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_the_loss_neither_overflows_nor_depends_on_lengths() -> None:
    anchor = torch.tensor([[1e4, 0.0]], requires_grad=True)
    away = object_contrastive_loss(anchor, -anchor.detach(), anchor.detach()[:, None].expand(1, 5, 2), 1e-3)
    assert away.item() == pytest.approx(2000 + math.log(5), rel=1e-5)
    (gradient,) = torch.autograd.grad(away.sum(), anchor)
    assert torch.isfinite(gradient).all()
    low = torch.randn(2, 8).to(torch.bfloat16)
    assert object_contrastive_loss(low, low, low[:, None], 0.07).dtype is torch.float32


def test_the_queue_is_first_in_first_out_and_detached() -> None:
    queue = ContrastiveQueue(size=5, num_negatives=1)
    source = torch.arange(8.0)[:, None].expand(8, 3).clone().requires_grad_()
    queue.push([_key(i, 0) for i in range(3)], source[:3] * 1)
    queue.push([_key(i, 0) for i in range(3, 8)], source[3:] * 1)
    assert [entry.key.exp_id for entry in queue.entries] == ["3", "4", "5", "6", "7"]
    assert [float(entry.embed[0]) for entry in queue.entries] == [3, 4, 5, 6, 7]
    assert not any(entry.embed.requires_grad for entry in queue.entries)


def test_keys_and_embeddings_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="longer"):
        ContrastiveQueue(5, 1).push([_key(0, 0)], torch.zeros(2, 3))


ENTRIES = [
    _key(0, 0, (1, 2)),  # 0: the anchor itself
    _key(0, 1, (1, 2)),  # 1: same expression, other frame: nothing
    _key(1, 0, (2, 1)),  # 2: positive
    _key(2, 0, (1,)),  # 3: subset of the objects: negative
    _key(3, 1, (1, 2)),  # 4: same objects at another frame: negative as released
    _key(1, 0, (1, 2), video="w"),  # 5: another video: negative
    _key(1, 0, (1, 2), dataset="revos"),  # 6: another dataset: negative
    _key(4, 0, (1, 2)),  # 7: positive
]


@pytest.mark.parametrize(("exclude", "negative"), [(False, [3, 4, 5, 6]), (True, [3, 5, 6])])
def test_positives_and_negatives_follow_the_rules(exclude: bool, negative: list[int]) -> None:
    queue = ContrastiveQueue(size=50, num_negatives=2, exclude_same_objects=exclude)
    queue.push(ENTRIES, torch.zeros(len(ENTRIES), 3))
    (found,) = queue.candidates([ENTRIES[0]])
    assert found is not None
    assert found.positive.tolist() == [2, 7]
    assert found.negative.tolist() == negative


def test_an_expression_without_objects_has_no_term_but_serves_as_a_negative() -> None:
    queue = ContrastiveQueue(size=50, num_negatives=1)
    keys = [_key(0, 0, ()), _key(1, 0, ()), _key(2, 0, (1,)), _key(3, 0, (1,))]
    queue.push(keys, torch.zeros(4, 3))
    first, second, third, _ = queue.candidates(keys)
    assert first is None
    assert second is None
    assert third is not None
    assert third.negative.tolist() == [0, 1]


@pytest.mark.parametrize(("num_negatives", "has_term"), [(4, True), (5, False)])
def test_too_few_negatives_give_no_term(num_negatives: int, has_term: bool) -> None:
    queue = ContrastiveQueue(size=50, num_negatives=num_negatives)
    queue.push(ENTRIES, torch.zeros(len(ENTRIES), 3))
    assert (queue.candidates([ENTRIES[0]])[0] is not None) is has_term


def test_only_the_named_datasets_take_part() -> None:
    queue = ContrastiveQueue(size=50, num_negatives=1, datasets=["mevis"])
    queue.push(ENTRIES, torch.zeros(len(ENTRIES), 3))
    assert [entry.key.dataset for entry in queue.entries] == ["mevis"] * 7
    revos = [_key(0, 0, dataset="revos"), _key(1, 0, dataset="revos")]
    assert queue.candidates(revos) == [None, None]
    assert len(queue.loss(revos, torch.randn(2, 3), 0.07, np.random.default_rng(0))) == 0


def test_the_loss_draws_from_the_candidates_and_reaches_the_anchors_alone() -> None:
    queue = ContrastiveQueue(size=50, num_negatives=4)
    embeds = torch.randn(len(ENTRIES), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = queue.loss(ENTRIES, embeds, 0.5, np.random.default_rng(7))
    rng, expected, anchors = np.random.default_rng(7), [], []
    for row, found in enumerate(queue.candidates(ENTRIES)):
        if found is not None:
            anchors.append(row)
            positive = int(rng.choice(found.positive))
            negative = rng.choice(found.negative, 4)
            data = embeds.detach().double()
            expected.append(_naive(data[row], data[positive], data[negative], 0.5))
    assert anchors == [0, 1, 2, 4, 7]
    torch.testing.assert_close(losses.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses.sum(), embeds)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == anchors


@pytest.mark.parametrize("size", [6, 20, 512])
@pytest.mark.parametrize("exclude", [False, True])
def test_counted_terms_are_those_the_losses_give(size: int, exclude: bool) -> None:
    """Over several micro-batches, with entries that fall out in between."""
    rng = np.random.default_rng(0)
    queue = ContrastiveQueue(size, num_negatives=4, datasets=["mevis"], exclude_same_objects=exclude)
    nonzero = 0
    for step in range(6):
        micro_batches = [
            [
                _key(
                    int(rng.integers(3)),
                    int(rng.integers(2)),
                    tuple(range(int(rng.integers(3)))),
                    video=f"v{rng.integers(2)}",
                    dataset="mevis" if rng.random() < 0.8 else "revos",
                )
                for _ in range(7)
            ]
            for _ in range(3)
        ]
        before = [entry.key for entry in queue.entries]
        expected = queue.count_terms(micro_batches)
        assert [entry.key for entry in queue.entries] == before, step
        given = [len(queue.loss(keys, torch.randn(7, 3), 0.07, rng)) for keys in micro_batches]
        assert expected == sum(given)
        nonzero += sum(given)
    assert nonzero > 0


def test_no_term_is_a_part_of_the_graph_all_the_same() -> None:
    """ZeRO-3 follows the graph on each rank, and waits for the others where they differ."""
    embeds = torch.randn(1, 3, dtype=torch.bfloat16, requires_grad=True)
    losses = ContrastiveQueue(8, 1).loss([_key(0, 0)], embeds, 0.07, np.random.default_rng(0))
    assert (losses.shape, losses.dtype) == ((0,), torch.float32)
    (gradient,) = torch.autograd.grad(losses.sum(), embeds)
    assert not gradient.any()
