"""What the engine is told by a launcher, what it tells DeepSpeed, and how it leaves."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from glus.train.engine import build_adamw, launcher_variables, leave_process_group
from tests.programs import run


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


LIMITS = """
import torch
import torch.distributed as dist
from glus.train.engine import init_distributed
import deepspeed
init_distributed(timeout_minutes=7)
for group in (dist.group.WORLD, deepspeed.utils.groups._get_data_parallel_group()):
    print(group._get_backend(torch.device("cpu")).options._timeout)
"""


def test_the_limit_of_waiting_holds_for_gradients_too() -> None:
    done = run(sys.executable, "-c", LIMITS)
    assert done.stdout.split() == ["0:07:00"] * 2, done.stderr


def test_a_rank_that_the_others_leave_alone_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL may wait for them without end."""
    began, never = threading.Event(), threading.Event()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (began.set(), never.wait()))
    leave_process_group(patience_seconds=0.1)
    assert began.wait(60)
    never.set()


@pytest.mark.parametrize("fused", [False, True])
def test_fused_adamw_takes_the_same_steps(fused: bool) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(50, 3)) for _ in range(2)]
    adamw = build_adamw(parameters, 1e-2, (0.9, 0.95), 0.1, fused)
    expected = [parameter.detach().clone() for parameter in parameters]
    moments = [[torch.zeros_like(value), torch.zeros_like(value)] for value in expected]
    for step in range(1, 4):
        for parameter, value, (first, second) in zip(parameters, expected, moments, strict=True):
            parameter.grad = torch.randn_like(parameter)
            first.lerp_(parameter.grad, 0.1)
            second.lerp_(parameter.grad.square(), 0.05)
            value.mul_(1 - 1e-2 * 0.1)
            value -= 1e-2 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        adamw.step()
    assert adamw.param_groups[0]["fused"] == (fused or None)
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)
