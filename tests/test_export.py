"""tools/export.py: one self-contained folder that computes what the checkpoint computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glus.models.build import LoadedModel, load_model, save_model, trainable_names
from tools.export import export


@pytest.fixture
def checkpoint(tiny_model: LoadedModel, tmp_path: Path) -> Path:
    """A run's checkpoint whose adapters are not zero. It names no towers, so it must hold every tensor."""
    torch.manual_seed(1)
    tensors = {name: value.clone() for name, value in tiny_model.glus.state_dict().items()}
    for name in tensors:
        if ".lora_B." in name:
            tensors[name] = torch.randn_like(tensors[name]) * 0.1
    save_model(tmp_path / "run", tensors, tiny_model.config, tiny_model.vocabulary, complete=True, metadata={})
    return tmp_path / "run"


def test_merged_model_gives_the_same_states(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "export", torch.float32)
    live, merged = load_model(checkpoint), load_model(tmp_path / "export")
    assert any(".lora_" in name for name in trainable_names(live.glus))
    assert not any(".lora_" in name for name, _ in merged.glus.named_parameters())
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask, visual = torch.ones_like(ids, dtype=torch.bool), torch.zeros(0, live.glus.language.width)
    with torch.no_grad():
        expected, got = (model.glus.language.states(ids, mask, visual) for model in (live, merged))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "export" / "README.md").read_text().startswith("# A GLUS model")


def test_an_existing_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(FileExistsError, match="--output"):
        export(checkpoint, tmp_path / "export", torch.float32)
