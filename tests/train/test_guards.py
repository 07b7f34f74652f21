"""Signals, spikes and counted samples."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from glus.batch import Batch
from glus.train.guards import Preemption
from glus.train.trainer import SPIKE_MIN_STEPS, drawn_samples, shares, spike
from glus.types import ObjectKey


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_and_the_handler_given_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.name
        os.kill(os.getpid(), number)
        assert preemption.name == name
    assert signal.getsignal(number) is before


def test_a_spike_is_measured_against_the_median() -> None:
    losses = [1.0] * (SPIKE_MIN_STEPS - 1)
    assert spike(losses, 100.0) == 1
    assert spike([*losses, 50.0], 3.0) == 3
    assert spike([0.0] * SPIKE_MIN_STEPS, 1.0) == float("inf")


def test_samples_are_counted_by_video_not_by_sentence() -> None:
    """Three sentences of a video of a, one of another of b."""
    batch = object.__new__(Batch)
    batch.video_index = torch.tensor([0, 0, 0, 1])
    batch.object_keys = [[ObjectKey(name, "v", "0", "f", frozenset())] for name in "aaab"]
    counts = drawn_samples([batch, batch], ["a", "b", "c"])
    assert counts == {"a": 2, "b": 2, "c": 0}
    assert shares(counts) == {"a": 0.5, "b": 0.5, "c": 0}
