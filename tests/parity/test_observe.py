"""Observation changes nothing and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.parity.network import observed


def test_calls_are_recorded_in_order_and_results_unchanged():
    layer = nn.Linear(2, 3)
    inputs = [torch.ones(1, 2), torch.zeros(1, 2)]
    with observed(layer=(layer, "forward")) as calls:
        outputs = [layer(value) for value in inputs]
    assert [call.arguments for call in calls["layer"]] == [(value,) for value in inputs]
    assert [call.result for call in calls["layer"]] == outputs


@pytest.mark.parametrize("error", [None, ValueError("stop")])
def test_methods_come_back(error):
    layer = nn.Linear(2, 3)
    own = lambda value: value + 1  # noqa: E731
    layer.extra_repr = own  # a method that the instance had replaced already
    try:
        with observed(forward=(layer, "forward"), other=(layer, "extra_repr")) as calls:
            assert layer.extra_repr(1) == 2
            if error:
                raise error
    except ValueError:
        assert error
    assert "forward" not in vars(layer)
    assert layer.extra_repr is own
    layer(torch.ones(1, 2))
    assert not calls["forward"]
