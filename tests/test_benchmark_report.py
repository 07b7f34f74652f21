"""What benchmarks measure with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tools.benchmarks.measuring import count_operations


def test_operations_of_attention_are_counted() -> None:
    """Two products of (L, A, d) per head; backward five (two gradients each, and the scores once more)."""
    queries = torch.randn(2, 3, 7, 8, requires_grad=True)
    keys, values = torch.randn(2, 2, 3, 11, 8, requires_grad=True).unbind()
    product = 2 * (2 * 3) * 7 * 11 * 8
    with count_operations() as forward:
        attended = F.scaled_dot_product_attention(queries, keys, values)
    with count_operations() as backward:
        attended.sum().backward()
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product
