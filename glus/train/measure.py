"""How torch is to count the operations of attention."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def attention_counts() -> dict[Any, Callable[..., int]]:
    """Kernel of attention, forwards or backwards -> what counts its operations, given its arguments, tensors as shapes.

    Causal attention counts half of the square, since kernels leave out what is hidden. The CPU's kernel, which torch
    does not count, is among them.
    """
    names = product(("flash_attention", "efficient_attention", "flash_attention_for_cpu"), ("", "_backward"))
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}{ending}") for name, ending in names]
    return {kernel: _attention_count(kernel) for kernel in kernels}


def _attention_count(kernel: Any) -> Callable[..., int]:
    names = [argument.name for argument in kernel.default._schema.arguments]
    count, number = (sdpa_flop_count, 3) if names[0] == "query" else (sdpa_backward_flop_count, 4)
    causal = names.index("is_causal")

    def operations(*arguments: Any, **options: Any) -> int:
        is_causal = arguments[causal] if len(arguments) > causal else options.get("is_causal", False)
        return count(*arguments[:number]) // (2 if is_causal else 1)

    return operations
