"""Arithmetic of batches and schedules, and the loop's guard."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import pytest

from glus.config import TrainerConfig
from glus.train.checkpoint import RunState
from glus.train.engine import warmup_decay
from glus.train.trainer import Trainer, accumulation_steps, micro_batches, speed, step_line


def test_accumulation_is_derived() -> None:
    assert accumulation_steps(80, 2, 4) == 10
    assert accumulation_steps(4, 4, 1) == 1
    with pytest.raises(ValueError, match=r"trainer.global_batch_size=10 .*=2 x 4 processes = 8"):
        accumulation_steps(10, 2, 4)


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (1, 4), (2, 2), (3, 2)])
def test_ranks_share_the_same_global_batches(micro: int, world: int) -> None:
    """Disjoint shares that together are step s's samples, in whatever number of processes."""
    global_batch, steps = 12, 3
    per_rank = [list(micro_batches(0, steps, global_batch, micro, rank, world)) for rank in range(world)]
    accumulation = global_batch // (micro * world)
    for step in range(steps):
        window = slice(step * accumulation, (step + 1) * accumulation)
        drawn = [n for rank in per_rank for n in itertools.chain(*rank[window])]
        assert sorted(drawn) == list(range(step * global_batch, (step + 1) * global_batch))
    if world > 1:
        assert not set(itertools.chain(*per_rank[0])) & set(itertools.chain(*per_rank[1]))


def test_continuing_skips_what_was_drawn() -> None:
    whole = list(micro_batches(0, 5, 4, 2, 0, 1))
    assert list(micro_batches(2, 5, 4, 2, 0, 1)) == whole[4:]


def test_warmup_then_linear_decay() -> None:
    factor = warmup_decay(warmup_steps=4, total_steps=14)
    assert [factor(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]
    assert factor(9) == pytest.approx(0.5)
    assert factor(14) == 0
    assert warmup_decay(0, 10)(0) == 1.0


def test_utilisation_is_told_where_the_peak_is_known() -> None:
    assert speed(80, 10.0, peak=20.0) == {"samples_per_second": 8.0, "mfu": 0.4}
    assert speed(80, 10.0, peak=None) == {"samples_per_second": 8.0}


def test_a_step_is_a_line_that_fits() -> None:
    """B3: at most 110 characters with the clock before it."""
    values = {"seg": 0.012345, "bce": 0.4, "dice": 12.3456, "iou": 0.0, "mask_iou": 1e-9, "object_score": 0.123456}
    values |= {"contrastive": 0.1, "total": 12.3456789, "learning_rate": 1e-3, "mixture/a": 1.0, "seconds": 12.345}
    line = step_line(120, 3000, values)
    assert line.startswith("step 120/3000  loss 12.35  seg 0.0123  bce 0.4  dice 12.3  iou 0")
    assert line.endswith("  12.35 s/step  9:52:34 left")
    assert len("12:34:56 " + line) <= 110
    assert step_line(1, 2, {"skipped": 1, "seconds": 1.0}) == "step 1/2  skipped  1.00 s/step  0:00:01 left"


@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "SIGTERM"), ("", "a signal to another process")])
def test_who_was_told_to_stop_is_said(name: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, state = TrainerConfig(steps=9), RunState(step=4)
    parts = {"settings": settings, "state": state, "metrics": Mock(), "checkpoints": Mock(), "evaluate": None}
    trainer = Trainer(Mock(), Mock(), Mock(), **parts, accumulation=1, asked_shares={})
    trainer._preemption.name, trainer._is_stopping = name, True
    with trainer._watch:
        trainer._save()
    assert f"stopped by {said} after step 4, saved; the same command goes on" in caplog.text
