"""Embeddings and head trained only in the rows of the added tokens."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from glus.batch import Batch
from glus.models.build import mark_trainable, trainable_names
from glus.models.glus import Glus
from glus.models.pretrained import TRAINED_FILE, LoadedModel, build_glus, load_model, save_model
from tests.merging import merge_new_rows
from tests.models.conftest import BatchMaker, save_trained
from tools.export import export

EMBEDDINGS, HEAD = "mllm.llama.model.embed_tokens", "mllm.llama.lm_head"
PARTS = ["embeddings_new_rows", "lm_head_new_rows"]


@pytest.fixture
def rows_model(tiny_model: LoadedModel) -> LoadedModel:
    """The tiny model, of whose tables only the added tokens' rows are trained."""
    config = copy.deepcopy(tiny_model.config)
    config.model.trainable = [*PARTS, "lora"]
    glus = build_glus(config.model).eval()
    glus.load_state_dict(tiny_model.glus.state_dict(), strict=False)
    for name in (EMBEDDINGS, HEAD):
        table = glus.get_submodule(name)
        table.new_rows.data.copy_(table.weight[list(table.ids)])
    return LoadedModel(glus, tiny_model.vocabulary, config)


def _added_ids(model: LoadedModel) -> list[int]:
    return sorted(model.vocabulary.added_tokens.values())


def _loss(glus: Glus, batch: Batch) -> torch.Tensor:
    output = glus(batch)
    return output.seg_logits_NQV.logsumexp(-1).mean() + output.seg_embeds_NQC.square().mean()


def test_only_the_rows_and_nothing_else_of_the_tables_is_trained(rows_model: LoadedModel) -> None:
    names = [name for name in trainable_names(rows_model.glus) if ".lora_" not in name]
    assert names == [f"{EMBEDDINGS}.new_rows", f"{HEAD}.new_rows"]
    for name in (EMBEDDINGS, HEAD):
        table = rows_model.glus.get_submodule(name)
        assert list(table.ids) == _added_ids(rows_model)
        assert table.new_rows.shape == (len(table.ids), rows_model.glus.mllm.width)


def test_outputs_and_gradients_are_those_of_the_whole_tables(
    rows_model: LoadedModel, glus: Glus, make_batch: BatchMaker
) -> None:
    mark_trainable(glus, ["embeddings", "lm_head"])
    batch, ids = make_batch((2, 1)), _added_ids(rows_model)
    losses = [_loss(model, batch) for model in (rows_model.glus, glus)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for name in (EMBEDDINGS, HEAD):
        expected = glus.get_submodule(name).weight.grad[ids]
        assert expected.abs().max() > 0
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            rows_model.glus.get_submodule(name).new_rows.grad, expected, rtol=0, atol=1e-6 * scale
        )


def _train(glus: Glus, batch: Batch) -> None:
    parameters = [parameter for parameter in glus.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        _loss(glus, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_after_steps_the_merged_tables_differ_in_the_new_rows_only(
    rows_model: LoadedModel, glus: Glus, make_batch: BatchMaker
) -> None:
    batch = make_batch((2, 1))
    _train(rows_model.glus, batch)
    with torch.no_grad():
        live = _loss(rows_model.glus, batch)
        merge_new_rows(rows_model.glus.mllm.llama)
        assert torch.equal(_loss(rows_model.glus, batch), live)
    assert isinstance(rows_model.glus.get_submodule(EMBEDDINGS), nn.Embedding)
    assert rows_model.glus.state_dict().keys() == glus.state_dict().keys()
    image_start, image_end, seg = (rows_model.vocabulary.added_tokens[t] for t in ("<im_start>", "<im_end>", "[SEG]"))
    for name, used in ((EMBEDDINGS, {image_start, image_end, seg}), (HEAD, set(_added_ids(rows_model)))):
        changed = rows_model.glus.get_submodule(name).weight != glus.get_submodule(name).weight
        assert used <= set(changed.any(1).nonzero().flatten().tolist()) <= set(_added_ids(rows_model))


def test_an_export_holds_whole_tables_and_computes_what_the_live_model_does(
    rows_model: LoadedModel, make_batch: BatchMaker, tmp_path: Path
) -> None:
    batch = make_batch((2, 1))
    _train(rows_model.glus, batch)
    tensors, config = rows_model.glus.state_dict(), rows_model.config
    save_model(tmp_path / "run", tensors, config, rows_model.vocabulary, metadata={})
    export(tmp_path / "run", tmp_path / "export", torch.float32)
    exported = load_model(tmp_path / "export")
    assert not set(PARTS) & set(exported.config.model.trainable)
    with torch.no_grad():
        torch.testing.assert_close(_loss(exported.glus, batch), _loss(rows_model.glus, batch), rtol=1e-5, atol=0)


def test_a_checkpoint_holds_the_rows_instead_of_the_tables(
    rows_model: LoadedModel, make_batch: BatchMaker, tmp_path: Path
) -> None:
    _train(rows_model.glus, make_batch((2, 1)))
    save_trained(tmp_path / "step", rows_model, rows_model.glus)
    tensors = load_file(tmp_path / "step" / TRAINED_FILE)
    loaded = load_model(tmp_path / "step").glus.state_dict()  # its frozen parts are random: the config names no towers
    for name in (EMBEDDINGS, HEAD):
        assert torch.equal(loaded[f"{name}.new_rows"], tensors[f"{name}.new_rows"])
        assert f"{name}.weight" not in tensors


@pytest.mark.parametrize("whole", ["embeddings", "llm"])
def test_rows_and_whole_table_together_are_an_error(tiny_model: LoadedModel, whole: str) -> None:
    config = copy.deepcopy(tiny_model.config.model)
    config.trainable = [whole, "embeddings_new_rows"]
    with pytest.raises(ValueError, match=f"'{whole}' and 'embeddings_new_rows'"):
        build_glus(config)
