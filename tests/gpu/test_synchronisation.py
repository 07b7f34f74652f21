"""What ``test_synchronisation.py`` of models and of inference count on a CPU, as CUDA itself sees it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from glus.config import ContrastiveConfig, LossConfig, SettingsConfig
from glus.inference.predictor import load_predictor
from glus.losses.objective import build_objective
from glus.models.pretrained import LoadedModel
from tests.models.conftest import BatchMaker
from tests.models.conftest import make_batch as make_batch  # the fixture
from tests.waits import cuda_waits
from tools.benchmarks.plain import SHIPPED_MODEL, BenchmarkVideo

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


def test_a_predicted_chunk_waits_once() -> None:
    """What happens once per video is left out: counted are the waits of four chunks less those of two."""
    predictor, _ = load_predictor(SHIPPED_MODEL, SettingsConfig(chunk_frames=8))
    found = []
    for num_chunks in (2, 2, 4):  # the first one moves constants
        video = BenchmarkVideo(num_chunks * 8, 128, 128)
        with cuda_waits() as waits:
            list(predictor.segment(video, video.texts(3)))
        found.append(waits)
    more = found[2] - found[1]
    assert more.total() <= 2, more
