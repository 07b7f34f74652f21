"""What makes a GPU be waited for, found on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "lift_fresh", "nonzero", "masked_select", "_unique2")
"""Operations that wait for a GPU: reading a number (the second and third are called so under inference_mode), a tensor
made of Python numbers (a list as an index is one), sizes that depend on values."""


class Waits(TorchDispatchMode):
    """Counts operations that would wait, by name; ``index by bool`` is one whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.found.update([name] if name in WAITS else [])
        if name == "index" and any(part is not None and part.dtype is torch.bool for part in args[1]):
            self.found.update(["index by bool"])
        return func(*args, **(kwargs or {}))
