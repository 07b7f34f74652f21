"""A micro-step never waits for the GPU: nothing is read back, and no small tensor is made here and copied there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from glus.config import ContrastiveConfig, LossConfig
from glus.losses.build import build_objective
from glus.models.glus import Glus, IouHead
from glus.structures import Batch

WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2")
"""Operations that wait for a GPU: reading a number, a tensor made of Python numbers, sizes that depend on values."""


class _Waits(TorchDispatchMode):
    """Counts operations that would wait, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.found.update([name] if name in WAITS else [])
        return func(*args, **(kwargs or {}))


def test_forward_losses_and_backward_never_wait(glus: Glus, make_batch: Callable[..., Batch]) -> None:
    glus.iou_head = IouHead(glus.language.width, glus.segmenter.width)
    glus.train()
    weights = {**LossConfig().weights, "iou": 0.1}
    objective = build_objective(LossConfig(weights, ContrastiveConfig(num_negatives=2)), seg_id=3)
    batch, rng = make_batch((3, 2)), np.random.default_rng(0)
    with _Waits() as waits:
        terms = objective(glus(batch), batch, objective.counts([batch]), rng)
        terms["total"].backward()
    assert terms["contrastive"] > 0
    # The one number read is LanguageModel.splice's check of the visual tokens, which runs on the CPU only; the one
    # tensor made is the drawn negatives, which are copied without waiting.
    assert waits.found == {"_local_scalar_dense": 1, "lift_fresh": 1}
