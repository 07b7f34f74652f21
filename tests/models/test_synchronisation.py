"""A micro-step never waits for the GPU: nothing is read back, and no small tensor is made here and copied there."""

from __future__ import annotations

import numpy as np
import torch

from glus.config import ContrastiveConfig, LossConfig
from glus.losses.objective import build_objective
from glus.models.glus import Glus, IouHead
from glus.train.plan import run_backward
from tests.by_shapes import MetaGpu
from tests.models.conftest import BatchMaker
from tests.waits import Waits


def test_forward_losses_and_backward_never_wait(glus: Glus, make_batch: BatchMaker) -> None:
    glus.iou_head = IouHead(glus.mllm.width, glus.segmenter.width)
    glus.train()
    weights = {**LossConfig().weights, "iou": 0.1}
    objective = build_objective(LossConfig(weights, ContrastiveConfig(num_negatives=2)), seg_id=3)
    batch, rng = make_batch((3, 2)), np.random.default_rng(0)
    with Waits() as waits:
        terms = objective(glus(batch), batch, objective.counts([batch]), rng)
        terms["total"].backward()
    assert terms["contrastive"] > 0
    # The tensor made is the drawn negatives, which are copied without waiting.
    assert waits.found == {"lift_fresh": 1}


def test_nothing_is_copied_to_another_device_unless_it_travels_beside_the_work(
    glus: Glus, make_batch: BatchMaker
) -> None:
    """As the meta device sees it, to which constants went in an earlier micro-step, as they would to a GPU."""
    objective = build_objective(LossConfig(contrastive=ContrastiveConfig(num_negatives=2)), seg_id=3)
    with torch.no_grad():
        glus(make_batch((3, 2)))  # so that sam2 keeps position encodings of the CPU
    glus.to("meta").train()
    rotary = glus.mllm.llama.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to("meta")  # which the model does for every device but this one
    batch = make_batch((3, 2)).to("meta")
    for waits in (Waits(), Waits()):
        with MetaGpu() as gpu, waits:
            rng = np.random.default_rng(0)
            run_backward(objective(glus(batch), batch, objective.counts([batch]), rng)["total"])
    assert not gpu.reads
    assert not {name for name in waits.found if "copy" in name}
