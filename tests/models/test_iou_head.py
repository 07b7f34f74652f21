"""The IoU head: it reads the [SEG] state and changes nothing, and travels with a model, but not to the release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glus.batch import Batch
from glus.config import LossConfig, ModelFolderConfig
from glus.losses.objective import build_objective
from glus.models.build import trainable_names
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel, build_glus, load_model, save_model
from glus.models.weights import read_tensors
from tests.models.conftest import BatchMaker
from tools.convert_weights import convert_to_release
from tools.export import export

HEAD = {f"iou_head.fc{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")}


def build(model: LoadedModel, iou_head: bool) -> Glus:
    torch.manual_seed(0)
    return build_glus(replace(model.config.model, iou_head=iou_head))


@pytest.fixture
def folder(tiny_model: LoadedModel, tmp_path: Path) -> Path:
    """A model folder with a head."""
    config = replace(tiny_model.config, model=replace(tiny_model.config.model, iou_head=True))
    assert isinstance(config, ModelFolderConfig)
    tensors = build(tiny_model, True).state_dict()
    save_model(tmp_path / "model", tensors, config, tiny_model.vocabulary, metadata={})
    return tmp_path / "model"


def gradients(glus: Glus, batch: Batch, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    objective = build_objective(LossConfig({**LossConfig().weights, "contrastive": 0.0, **weights}), seg_id=3)
    terms = objective(glus.train()(batch), batch, objective.counts([batch]), np.random.default_rng(0))
    terms["total"].backward()
    return {name: parameter.grad for name, parameter in glus.named_parameters() if parameter.grad is not None}


def test_all_else_starts_as_it_would_without(tiny_model: LoadedModel) -> None:
    with_head, without = (build(tiny_model, wanted) for wanted in (True, False))
    assert set(with_head.state_dict()) - set(without.state_dict()) == HEAD
    for name, value in without.state_dict().items():
        assert torch.equal(with_head.state_dict()[name], value), name
    assert set(trainable_names(with_head)) - set(trainable_names(without)) == HEAD


def test_its_training_leaves_all_other_gradients_alone(tiny_model: LoadedModel, make_batch: BatchMaker) -> None:
    batch = make_batch((3, 2))
    without = gradients(build(tiny_model, False), batch, {})
    with_head = gradients(build(tiny_model, True), batch, {"iou": 0.1})
    assert with_head.keys() - without.keys() == HEAD
    assert all(float(with_head[name].abs().max()) > 0 for name in HEAD)
    for name, gradient in without.items():
        assert torch.equal(with_head[name], gradient), name


def test_in_bfloat16_its_answer_is_float32(tiny_model: LoadedModel, make_batch: BatchMaker) -> None:
    glus = build(tiny_model, True).bfloat16()
    with torch.no_grad():
        logits_NQ = glus(make_batch((2, 1))).iou_logits_NQ
    assert (logits_NQ.shape, logits_NQ.dtype) == ((3, 2), torch.float32)


def test_it_travels_with_model_folders_and_exports(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "export", torch.float32)
    before, after = (load_model(path).glus.state_dict() for path in (folder, tmp_path / "export"))
    for name in HEAD:
        assert torch.equal(before[name], after[name])


def test_the_released_layout_leaves_it_out_and_says_so(folder: Path, tmp_path: Path) -> None:
    written = convert_to_release(folder, tmp_path / "released", None, True, 10**9)
    assert written["left out: tensors of the IoU head, for which the layout has no place"] == 4
    names = read_tensors(tmp_path / "released").keys()
    assert not any("iou_head" in name for name in names)


@pytest.mark.parametrize("wanted", [True, False])
def test_training_may_start_from_a_model_with_or_without_it(
    tiny_model: LoadedModel, folder: Path, tmp_path: Path, wanted: bool
) -> None:
    config = replace(tiny_model.config.model, iou_head=wanted)
    from_head = build_glus(replace(config, weights=str(folder))).state_dict()
    kept = HEAD & from_head.keys()
    assert kept == (HEAD if wanted else set())
    saved = load_model(folder).glus.state_dict()
    assert all(torch.equal(from_head[name], saved[name]) for name in kept)

    bare = tmp_path / "bare"
    tensors = build(tiny_model, False).state_dict()
    save_model(bare, tensors, tiny_model.config, tiny_model.vocabulary, metadata={})
    from_bare = build_glus(replace(config, weights=str(bare)))
    assert set(from_bare.state_dict()) - set(tensors) == (HEAD if wanted else set())


def test_weights_without_it_do_not_pass_for_a_model_that_has_it(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("iou_head: true", "iou_head: false"))
    with pytest.raises(ValueError, match=r"unexpected(?s:.*)iou_head"):
        load_model(folder)
