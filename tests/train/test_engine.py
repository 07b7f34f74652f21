"""What the engine is told by a launcher."""

from __future__ import annotations

import pytest
import torch

from glus.train.engine import launcher_variables


@pytest.mark.parametrize(("visible", "local_rank"), [(0, "3"), (1, "0"), (4, "3")])
def test_a_slurm_task_uses_the_gpu_that_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: str
) -> None:
    """All of its node's, or its own only."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    found = launcher_variables()
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("7", "8", local_rank)
