"""tools/export.py: one self-contained folder that computes what the checkpoint computes."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from torch import nn

from glus.batch import Conversation
from glus.data.chat.tree import separate_rows
from glus.models.build import trainable_names
from glus.models.pretrained import LoadedModel, load_model, save_model
from tests.merging import merge_lora
from tools.export import export, main, origins, push


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
        decoded = model.glus.decode_clip([frames], torch.tensor([0, 0]), embeds)
        return torch.stack([one.logits_Nmm for one in decoded], dim=1)


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
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "export").iterdir()), "B9: anyone may read"


def test_the_card_says_what_the_hub_asks_for(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ``--push`` uploads the folder by the hub's own calls, whose place a stand-in takes."""
    run = OmegaConf.create(OmegaConf.load(checkpoint / "config.yaml"))
    run.model.llm.weights, run.model.segmenter.weights = "weights/LISA-7B-v1", "weights/sam2_hiera_large.pt"
    run.data = {"mixture": {"mevis": {}}}
    monkeypatch.setattr("tools.export.origins", partial(lambda read, _: read(tmp_path / "run.yaml"), origins))
    OmegaConf.save(run, tmp_path / "run.yaml")
    report = {"dataset": "mevis", "split": "valid_u", "mean_over_sentences": {"j": 50.0, "f": 54.0, "jf": 52.0}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    calls: list[tuple[str, dict[str, Any]]] = []

    class StandIn:
        """The hub."""

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "https://huggingface.co/me/glus/commit/1"

    monkeypatch.setattr("tools.export.HfApi", StandIn)
    words = ["--weights", checkpoint, "--output", tmp_path / "out", "--scores", tmp_path, "--private"]
    words += ["--push", "me/glus"]
    main([*map(str, words)])
    assert calls[0] == ("me/glus", {"private": True, "exist_ok": True})
    assert (calls[1][1]["repo_id"], calls[1][1]["folder_path"]) == ("me/glus", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("other", ["xinlai/LISA-7B-v1", "facebook/sam2-hiera-large"])
    assert (card.data.datasets, card.data.library_name) == (["mevis"], "glus")
    assert [(e.metric_type, e.metric_value, e.dataset_split) for e in card.data.eval_results][-1] == (
        "J&F",
        52,
        "valid_u",
    )
    assert "| mevis | valid_u | 52.00 |" in card.text
    assert (tmp_path / "out" / "config.yaml").read_text().rstrip() in card.text
    with pytest.raises(ValueError, match="--push glus: expected owner/name"):
        push(tmp_path, "glus", is_private=False)


def test_scores_of_a_part_of_a_split_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    means = {"mean_over_sentences": {"j": 50.0, "f": 54.0, "jf": 52.0}}
    report = {"dataset": "mevis", "split": "valid_u", **means, "unscorable": ["mevis/v: its mask is cut short"]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"--scores .*: 1 videos or sentences could not be scored .*whole split"):
        export(checkpoint, tmp_path / "export", torch.float32, [tmp_path])


def test_what_made_a_run_goes_with_an_export_of_one_of_its_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    """And from there with an export of that."""
    step = tmp_path / "made" / "checkpoints" / "step_3"
    step.parent.mkdir(parents=True)
    checkpoint.rename(step)
    (tmp_path / "made" / "run.json").write_text('{"command": ["train.py"]}')
    export(step, tmp_path / "export", torch.float32)
    export(tmp_path / "export", tmp_path / "again", torch.float32)
    for folder in ("export", "again"):
        assert json.loads((tmp_path / folder / "run.json").read_text()) == {"command": ["train.py"]}
        assert "train.py" in (tmp_path / folder / "README.md").read_text()


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
