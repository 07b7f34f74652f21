"""What makes a GPU be waited for, found on a CPU, or with the meta device in the place of the GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),  # a number is read
    "lift_fresh",  # a tensor is made of Python numbers, as a list that is used as an index is
    *("nonzero", "argwhere", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"),
    "masked_scatter_backward",  # a masked_select inside
)
"""Operations that wait for a GPU: they read a number (``item`` and ``is_nonzero`` are called so under inference_mode),
or the size of their result depends on values."""
WAIT_WARNING = "called a synchronizing"
"""Of CUDA's warning about a wait; torch's notice that the mode is a prototype speaks of synchronizing too."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
COPIES = ("_to_copy", "copy_")


class Waits(TorchDispatchMode):
    """Counts operations that would wait, forwards and backwards, by name.

    ``index by bool`` is one whose size depends on values; ``repeat_interleave`` one that is not told its size;
    ``copy to cpu`` and ``blocking copy from cpu`` are copies between devices. Whether memory is page-locked cannot be
    seen without a GPU, so every copy that asks not to be waited for passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).split(".")[1]
        result = func(*args, **kwargs)
        if name in WAITS:
            self.found[name] += 1
        elif name in INDEXING and any(part is not None and part.dtype is torch.bool for part in args[1]):
            self.found["index by bool"] += 1
        elif str(func) == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.found[name] += 1
        elif name in COPIES:
            self.found.update(self._copy(func, args, kwargs, result))
        return result

    @staticmethod
    def _copy(func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> list[str]:
        is_in_place = str(func) == "aten.copy_.default"
        source, target = args[is_in_place].device.type, result.device.type
        may_go_on = args[2] if is_in_place and len(args) > 2 else kwargs.get("non_blocking", False)
        if source == target:
            return []
        if target == "cpu":
            return ["copy to cpu"]
        return [] if may_go_on else ["blocking copy from cpu"]


@contextmanager
def cuda_waits() -> Iterator[Counter[str]]:
    """Count the operations that CUDA itself calls synchronising, by the line of Python that they come from."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if WAIT_WARNING in str(w.message))
