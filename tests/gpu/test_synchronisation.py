"""What ``tests/models/test_synchronisation.py`` counts on a CPU, as CUDA itself sees it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from glus.config import ContrastiveConfig, LossConfig
from glus.losses.objective import build_objective
from glus.models.pretrained import LoadedModel
from tests.models.conftest import BatchMaker
from tests.models.conftest import make_batch as make_batch  # the fixture

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_micro_step_never_waits_for_the_gpu(
    tiny_model: LoadedModel, make_batch: BatchMaker, dtype: torch.dtype
) -> None:
    glus = copy.deepcopy(tiny_model.glus).to("cuda", dtype).train()
    objective = build_objective(LossConfig(contrastive=ContrastiveConfig(num_negatives=2)), seg_id=3)
    batch, rng = make_batch((3, 2)).to("cuda"), np.random.default_rng(0)
    objective(glus(batch), batch, objective.counts([batch]), rng)["total"].backward()  # moves constants there once
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(glus(batch), batch, objective.counts([batch]), rng)["total"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
