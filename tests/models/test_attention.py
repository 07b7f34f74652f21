"""Attention of tokens that continue others, as GPUs and as CPUs compute it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glus.models.mllm.decoder import causal_by_mask, causal_by_padding


@pytest.mark.parametrize("causal", [causal_by_padding, causal_by_mask])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_each_token_sees_the_prefix_and_those_before_it(causal: Callable[..., torch.Tensor], length: int) -> None:
    """Against the softmax written out, forwards and backwards."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 4, dtype=torch.float64) for tokens in (length, 9, 9))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    scores = query @ key.transpose(2, 3) * 0.3
    position = torch.arange(9)
    hidden = position[None, :] > position[-length:, None]
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    found = causal(query, key, value, 0.0, 0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((output * weights).sum(), leaves) for output in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
