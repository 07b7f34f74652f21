"""Packed conversations give what separate ones give: losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from glus.batch import Batch, GlusOutput
from glus.config import LossConfig
from glus.data.chat.tree import separate_rows, unpack_conversations
from glus.losses.objective import build_objective
from glus.models.glus import Glus
from tests.models.conftest import BatchMaker


def separate_states(glus: Glus, batch: Batch, visual_TD: torch.Tensor) -> torch.Tensor:
    """(N, Q, D) before each [SEG], each conversation in a row of its own that shows visual tokens of its own."""
    rows = separate_rows(unpack_conversations(batch.rows), pad_id=0)
    states_RD, _ = glus.mllm.states(rows, visual_TD)
    return states_RD.unflatten(0, (len(rows.input_ids_BL), -1))


def clip_masks(glus: Glus, batch: Batch, embeds_NQC: torch.Tensor) -> torch.Tensor:
    """Mask logits (N, Q, m, m) of a batch's query frames for these prompts."""
    decoded = glus.decode_clip(batch.query_frames, batch.video_index, embeds_NQC)
    return torch.stack([one.logits_Nmm for one in decoded], dim=1)


def _separate(glus: Glus, batch: Batch) -> GlusOutput:
    """The forward pass with each conversation in a row of its own, under the LLM's plain causal attention."""
    tokens_BTD = glus.see(batch).unflatten(0, (len(batch.query_frames), -1))
    states_NQD = separate_states(glus, batch, tokens_BTD[batch.video_index].flatten(0, 1))
    embeds_NQC, logits_NQV = glus.answer(states_NQD)
    return GlusOutput(logits_NQV, embeds_NQC, clip_masks(glus, batch, embeds_NQC))


def _learn(
    glus: Glus, forward: Callable[[Glus, Batch], GlusOutput], batch: Batch
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of one micro-batch."""
    glus = copy.deepcopy(glus).train()
    objective = build_objective(LossConfig({**LossConfig().weights, "contrastive": 0.0}), seg_id=3)
    terms = objective(forward(glus, batch), batch, objective.counts([batch]), np.random.default_rng(0))
    terms["total"].backward()
    gradients = {name: p.grad for name, p in glus.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, gradients


@pytest.fixture
def moved(glus: Glus) -> Glus:
    """LoRA's B is not 0, so that its A has a gradient too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in glus.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=generator)
    return glus


@pytest.mark.parametrize("rows", [(3,), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("num_context", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_separate_conversations(
    moved: Glus, make_batch: BatchMaker, rows: tuple[int, ...], num_context: int, checkpointing: bool
) -> None:
    if checkpointing:
        moved.mllm.decoder.checkpoint_gradients()
    batch = make_batch(rows, num_context, 2)
    assert len(batch.rows.input_ids_BL) == len(rows) < len(batch.names)
    losses, gradients = _learn(moved, Glus.forward, batch)
    plain_losses, plain_gradients = _learn(moved, _separate, batch)
    assert losses == pytest.approx(plain_losses, rel=1e-5, abs=0)
    assert gradients.keys() == plain_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain_gradients.values())
    for name, gradient in plain_gradients.items():
        scale = max(float(gradient.abs().max()), 1e-5 * largest)  # biases of keys have no gradient but float noise
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_in_bfloat16_packing_changes_no_more_than_rounding(moved: Glus, make_batch: BatchMaker) -> None:
    moved.to(torch.bfloat16)
    batch = make_batch((3, 2), 2, 2)
    with torch.no_grad():
        packed, separate = moved(batch).seg_embeds_NQC.float(), _separate(moved, batch).seg_embeds_NQC.float()
    torch.testing.assert_close(packed, separate, rtol=0, atol=0.03 * float(separate.abs().max()))
