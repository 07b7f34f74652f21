"""Processes of one machine have a GPU each: no event may stand in the queue of another one's."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from glus import distributed
from glus.config import PredictConfig
from glus.inference.job import load_for_split
from glus.inference.video_run import StageClock, _PendingMasks

GPU = torch.device("cuda", 3)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The queues that events were put into; None: the current GPU's."""
    queues: list[Any] = []
    event = Mock(record=lambda queue=None: queues.append(queue), elapsed_time=lambda other: 1000.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    return queues


def test_stages_are_timed_on_the_gpu_of_the_model(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    clock, seconds = StageClock(GPU), {"llm": 0.0}
    with clock.stage("llm"):
        pass
    clock.add_to(seconds)
    assert (recorded, waited, seconds) == ([GPU, GPU], [GPU], {"llm": 1.0})


def test_masks_are_waited_for_on_the_gpu_that_sends_them(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _PendingMasks(Mock(), [0], Mock(), GPU)
    assert recorded == [GPU]


def test_a_process_works_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert distributed.use_device() == GPU
    with pytest.raises(FileNotFoundError):
        load_for_split(PredictConfig(weights="nowhere"), [])
    assert used == [GPU, GPU]
