"""What stands in for a GPU in tests reports all that would be waited for, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from tests.waits import Waits, cuda_waits

Operation = Callable[[torch.Tensor], object]
"""Of a float tensor (4,) with gradient."""
WAITING: dict[str, Operation] = {
    "_local_scalar_dense": lambda x: float(x.detach()[0]),
    "lift_fresh": lambda x: torch.tensor([1.0, 2.0]),
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "index by bool": lambda x: x[x > 0],
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
    "masked_scatter_backward": lambda x: torch.zeros(4).masked_scatter(torch.ones(4, dtype=torch.bool), x).sum(),
}
"""What is to be reported -> what does it."""
GOING_ON: dict[str, Operation] = {
    "index_copy": lambda x: torch.zeros(6).index_copy(0, torch.arange(4), x).sum(),
    "index by numbers": lambda x: x[torch.arange(2)].sum(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0).sum(),
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(
        torch.ones(4, dtype=torch.int64), output_size=4
    ).sum(),
    "a copy on one device": lambda x: x.to(torch.float64).sum(),
}


def _found(operation: Operation) -> set[str]:
    x = torch.ones(4, requires_grad=True)
    with Waits() as waits:
        result = operation(x)
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
    return set(waits.found)


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_reported(name: str) -> None:
    assert name in _found(WAITING[name])


@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_wait_is_not(name: str) -> None:
    assert not _found(GOING_ON[name])


def test_the_gradient_of_an_index_by_bool_waits_as_well() -> None:
    with Waits() as forward:
        x = torch.ones(4, requires_grad=True)
        y = x[x > 0].sum()
    with Waits() as backward:
        y.backward()
    assert forward.found["index by bool"] == backward.found["index by bool"] == 1


def test_copies_between_devices_wait_unless_they_need_not() -> None:
    with Waits() as waits:
        there = torch.ones(4).to("meta", non_blocking=True)
        torch.empty(4, device="meta").copy_(torch.ones(4), non_blocking=True)
    assert not waits.found
    with Waits() as waits:
        torch.ones(4).to("meta")
        torch.empty(4, device="meta").copy_(torch.ones(4))
        there + torch.ones(4).to("meta", non_blocking=False)
    assert waits.found == {"blocking copy from cpu": 3}


def test_only_cudas_own_warnings_are_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_mode(mode: str) -> None:
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
                          "operations", stacklevel=1)  # fmt: skip

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with cuda_waits() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert list(found.values()) == [1]
