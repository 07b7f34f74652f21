"""tools/export.py: one self-contained folder that computes what the checkpoint computes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from glus.batch import Conversation
from glus.data.chat.tree import separate_rows
from glus.models.build import trainable_names
from glus.models.pretrained import LoadedModel, load_model, save_model
from tests.merging import merge_lora
from tools.export import export


@pytest.fixture
def checkpoint(tiny_model: LoadedModel, tmp_path: Path) -> Path:
    """A run's checkpoint whose adapters are not zero. It names no towers, so it must hold every tensor."""
    torch.manual_seed(1)
    tensors = {name: value.clone() for name, value in tiny_model.glus.state_dict().items()}
    for name in tensors:
        if ".lora_B." in name:
            tensors[name] = torch.randn_like(tensors[name]) * 0.1
    save_model(tmp_path / "run", tensors, tiny_model.config, tiny_model.vocabulary, metadata={})
    return tmp_path / "run"


def _masks(model: LoadedModel) -> torch.Tensor:
    """Mask logits of two random frames, prompted by the state after a random sentence."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    frames = torch.randint(0, 256, (2, 48, 56, 3), generator=generator, dtype=torch.uint8)
    conversations = [Conversation(row, np.array([10, 11])) for row in ids.numpy()]
    with torch.no_grad():
        states_RD, _ = model.glus.mllm.states(separate_rows(conversations, 0), torch.zeros(0, model.glus.mllm.width))
        embeds, _ = model.glus.answer(states_RD.unflatten(0, (2, 2)))
        return model.glus.segment_clip([frames], torch.tensor([0, 0]), embeds)


def test_merged_model_gives_the_same_masks(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "export", torch.float32)
    live, merged = load_model(checkpoint), load_model(tmp_path / "export")
    assert any(".lora_" in name for name in trainable_names(live.glus))
    assert not any(".lora_" in name for name, _ in merged.glus.named_parameters())
    expected, got = _masks(live), _masks(merged)
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
    for name, parameter in live.glus.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert float((_masks(live) - expected).abs().max()) > 1e-4  # the adapters do matter
    assert (tmp_path / "export" / "README.md").read_text().startswith("# A GLUS model")


def test_an_existing_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(FileExistsError, match="--output"):
        export(checkpoint, tmp_path / "export", torch.float32)


def test_a_card_that_cannot_be_written_leaves_no_folder(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "run.json").write_text("{broken")
    with pytest.raises(ValueError, match="Expecting"):
        export(checkpoint, tmp_path / "export", torch.float32)
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}


def test_a_quantised_base_is_not_merged_into(tiny_model: LoadedModel) -> None:
    glus = copy.deepcopy(tiny_model.glus)
    base = glus.mllm.llama.get_submodule("model.layers.0.self_attn.q_proj.base_layer")
    base.weight = nn.Parameter(torch.zeros(base.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj.*int8.*merging would round"):
        merge_lora(glus.mllm.llama)
