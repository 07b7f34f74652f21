"""Compiled layers: the same results, under the same names, and a clear message where nothing can be compiled."""

from __future__ import annotations

import copy

import pytest
import torch

from glus import compat
from glus.models.build import trainable_names
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from tests.models.conftest import BatchMaker


def gradients(glus: Glus, make_batch: BatchMaker, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Of the trained parameters, after a batch of videos with so many expressions."""
    glus.zero_grad()
    output = glus(make_batch(rows))
    (output.mask_logits_NQmm.square().mean() + output.seg_logits_NQV.float().logsumexp(-1).mean()).backward()
    return {name: p.grad.clone() for name, p in glus.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_layers_that_are_not_compiled(
    tiny_model: LoadedModel, make_batch: BatchMaker, checkpointing: bool
) -> None:
    """With LoRA, for batches of several lengths."""
    plain = copy.deepcopy(tiny_model.glus).train()
    torch.manual_seed(3)
    with torch.no_grad():  # LoRA's second factor starts at zero, which stops the gradient of the first
        for name, parameter in plain.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    compiled = copy.deepcopy(plain)
    for glus in (plain, compiled):
        if checkpointing:
            glus.mllm.decoder.checkpoint_gradients()
    compiled.mllm.decoder.compile_layers()
    torch._dynamo.utils.counters.clear()  # of the check
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for rows in ((2, 1), (1, 3), (2,)):
        expected, got = gradients(plain, make_batch, rows), gradients(compiled, make_batch, rows)
        assert any(".lora_A." in name for name in expected)
        assert expected.keys() == got.keys() <= set(trainable_names(plain))
        largest = max(float(value.abs().max()) for value in expected.values())
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * largest, msg=name)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # or nothing was compiled


def test_without_a_compiler_the_setting_is_named() -> None:
    torch._dynamo.reset()
    nowhere = {"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}
    with torch._inductor.config.patch(nowhere), pytest.raises(ValueError, match=r"trainer.compile: .*/nowhere/g"):
        compat.check_compiler(torch.device("cpu"))
