"""What is trained, what a model folder holds, and that it loads to the same model or not at all."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glus.batch import Batch
from glus.config import FuserGamma, LossConfig, ModelFolderConfig, Precision
from glus.files import hidden_sibling
from glus.losses.objective import build_objective
from glus.models.build import build_random, mark_trainable, parts_of, trainable_names
from glus.models.glus import Glus
from glus.models.mllm.llava import Llava
from glus.models.pretrained import (
    COMPLETE_FILE,
    CONFIG_FILE,
    TRAINED_FILE,
    LoadedModel,
    build_glus,
    find_model_folder,
    load_model,
    save_model,
)
from glus.models.segmenter.sam2 import Sam2Segmenter
from glus.train.plan import CostCounter
from tests.models.conftest import BatchMaker, save_trained

PARTS = parts_of(SimpleNamespace(mllm=Llava, segmenter=Sam2Segmenter))  # type: ignore[arg-type]
BUILT_PARTS = [part for part in PARTS if not part.endswith("_new_rows") and part != "iou_head"]
"""The others are there only if the config asks for them (test_new_rows, test_iou_head)."""
UNUSED = ("maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "obj_ptr_proj", "mask_downsample.")
"""SAM2's parameters that GLUS never calls; no part of ``model.trainable`` names them."""


def _part(names: list[str], part: str) -> set[str]:
    return {name for name in names if any(key in name for key in PARTS[part])}


def test_every_parameter_belongs_to_a_part_and_parts_do_not_overlap(glus: Glus) -> None:
    names = [name for name, _ in glus.named_parameters()]
    found = {part: _part(names, part) for part in BUILT_PARTS}
    assert all(found.values()), "a part without parameters"
    left = set(names) - set().union(*found.values())
    assert all(name.startswith(f"segmenter.sam.{UNUSED}") or any(key in name for key in UNUSED) for name in left)
    inside_llm = {"llm", "lora", "embeddings", "lm_head"}
    for part in found.keys() - inside_llm:
        for other in found.keys() - {part}:
            assert not found[part] & found[other], (part, other)
    for part in inside_llm - {"llm"}:
        assert found[part] < found["llm"]


def test_random_weights_take_no_more_room_than_the_network(tiny_model: LoadedModel) -> None:
    """Of its own precision; and they are weights: finite, none all zero but LoRA's second factor and biases."""
    config = replace(tiny_model.config.model, precision=Precision.bf16)
    config.llm = replace(config.llm, vocab_size=32004)  # so that the LLM is most of it
    counter = CostCounter(torch.device("cpu"))
    with counter:
        glus = build_random(config, torch.device("cpu"))
    tensors = {**dict(glus.named_parameters()), **dict(glus.named_buffers())}
    assert counter.peak < 1.25 * sum(tensor.nbytes for tensor in tensors.values())
    assert {parameter.dtype for parameter in glus.parameters()} == {torch.bfloat16}
    assert trainable_names(glus) == trainable_names(tiny_model.glus)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    drawn = {name: p for name, p in glus.mllm.llama.named_parameters() if "lora_" not in name and "norm" not in name}
    assert all(0.015 < parameter.float().std() < 0.025 for parameter in drawn.values())


@pytest.mark.parametrize("parts", [["seg_head"], ["lora", "projector"], BUILT_PARTS, []])
def test_mark_trainable_sets_exactly_the_named_parts(glus: Glus, parts: list[str]) -> None:
    mark_trainable(glus, parts)
    names = [name for name, _ in glus.named_parameters()]
    assert set(trainable_names(glus)) == set().union(*(_part(names, part) for part in parts))


def test_an_unknown_part_is_an_error_that_lists_the_known(glus: Glus) -> None:
    with pytest.raises(ValueError, match=r"unknown part 'decoder'.*mask_decoder"):
        mark_trainable(glus, ["seg_head", "decoder"])


def test_a_part_that_is_not_there_is_an_error(tiny_model: LoadedModel) -> None:
    config = copy.deepcopy(tiny_model.config.model)
    config.llm.lora_rank = 0
    with pytest.raises(ValueError, match="'lora' matches no parameter"):
        build_glus(config)


def test_never_updated_names_declared_tensors(glus: Glus) -> None:
    names = trainable_names(glus)
    for prefix in Sam2Segmenter.NEVER_UPDATED:
        assert any(name.startswith(prefix) for name in names), prefix


def _two_steps(glus: Glus, batch: Batch) -> set[str]:
    """Names of the parameters that two optimizer steps change."""
    glus.train()
    before = {name: parameter.detach().clone() for name, parameter in glus.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in glus.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        output = glus(batch)
        loss = output.mask_logits_NQmm.square().mean() + output.seg_logits_NQV.float().logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, parameter in glus.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_change_what_is_declared_and_nothing_else(
    glus: Glus, make_batch: BatchMaker, checkpointing: bool
) -> None:
    if checkpointing:
        glus.mllm.decoder.checkpoint_gradients()
        assert any(getattr(module, "gradient_checkpointing", False) for module in glus.mllm.modules())
    expected = {name for name in trainable_names(glus) if not name.startswith(Sam2Segmenter.NEVER_UPDATED)}
    assert len(expected) < len(trainable_names(glus))
    assert _two_steps(glus, make_batch((2, 1))) == expected


def test_gradient_checkpointing_changes_no_gradient(glus: Glus, make_batch: BatchMaker) -> None:
    batch, gradients = make_batch((2, 1)), []
    for checkpointing in (False, True):
        model = copy.deepcopy(glus).train()
        if checkpointing:
            model.mllm.decoder.checkpoint_gradients()
        model(batch).mask_logits_NQmm.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gradient_checkpointing_is_switched_on_and_off(glus: Glus) -> None:
    layers = glus.mllm.llama.model.layers
    glus.mllm.decoder.checkpoint_gradients()
    assert all(layer.gradient_checkpointing for layer in layers)
    glus.mllm.decoder.checkpoint_gradients(False)
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_gradient_checkpointing_has_another_name_in_older_transformers(glus: Glus) -> None:
    class Older(torch.nn.Module):
        said: tuple[object, ...] = ()

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
            self.said += (gradient_checkpointing_kwargs,)

        def gradient_checkpointing_disable(self) -> None:
            self.said += ("disabled",)

    glus.mllm.decoder.text = older = Older()
    glus.mllm.decoder.checkpoint_gradients()
    glus.mllm.decoder.checkpoint_gradients(False)
    assert older.said == ({"use_reentrant": False}, "disabled")


def test_frozen_language_model_still_passes_gradients_to_the_projector(glus: Glus, make_batch: BatchMaker) -> None:
    """Also with gradient checkpointing, whose inputs then carry the only gradient."""
    mark_trainable(glus, ["projector"])
    glus.mllm.decoder.checkpoint_gradients()
    assert _two_steps(glus, make_batch((2, 1))) == {"mllm.projector.weight", "mllm.projector.bias"}


def _randomised(glus: Glus) -> Glus:
    """Every trained tensor moved, LoRA's zeros too."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in glus.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return glus


def _save(folder: Path, model: LoadedModel, glus: Glus, config: ModelFolderConfig | None = None) -> None:
    save_model(folder, glus.state_dict(), config or model.config, model.vocabulary, {"source": "here"})


def _with_towers(model: LoadedModel, glus: Glus, folder: Path) -> LoadedModel:
    """The same model whose config names weights of its frozen parts, as a trained-only checkpoint needs."""
    folder.mkdir()
    config = copy.deepcopy(model.config)
    save_file(glus.mllm.clip.vision_model.state_dict(), folder / "model.safetensors")
    torch.save({"model": glus.segmenter.sam.state_dict()}, folder / "sam2.pt")
    plain = {
        name.replace(".base_layer", ""): value
        for name, value in glus.mllm.llama.state_dict().items()
        if ".lora_" not in name
    }
    save_file(plain, folder / "llm.safetensors")
    config.model.clip.weights = str(folder)
    config.model.segmenter.weights = str(folder / "sam2.pt")
    config.model.llm.weights = str(folder / "llm.safetensors")
    return LoadedModel(glus, model.vocabulary, config)


def test_a_complete_folder_loads_to_the_same_model(
    tiny_model: LoadedModel, glus: Glus, make_batch: BatchMaker, tmp_path: Path
) -> None:
    _save(tmp_path / "export", tiny_model, _randomised(glus))
    loaded = load_model(tmp_path / "export")
    torch.testing.assert_close(loaded.glus.state_dict(), glus.state_dict(), rtol=0, atol=0)
    assert not loaded.glus.training
    assert trainable_names(loaded.glus) == trainable_names(glus)
    with torch.no_grad():
        batch = make_batch((2, 1))
        assert torch.equal(loaded.glus(batch).mask_logits_NQmm, glus(batch).mask_logits_NQmm)


def test_a_large_model_is_written_as_shards(
    tiny_model: LoadedModel, glus: Glus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = _randomised(glus).state_dict()
    limit = sum(value.nbytes for value in tensors.values()) // 3
    monkeypatch.setattr("glus.models.pretrained.SHARD_BYTES", limit)
    save_model(tmp_path / "m", tensors, tiny_model.config, tiny_model.vocabulary, metadata={})
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) >= 3
    assert all(shard.stat().st_size <= limit + 50_000 for shard in shards)  # names and shapes come on top
    torch.testing.assert_close(load_model(tmp_path / "m").glus.state_dict(), tensors, rtol=0, atol=0)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_model(tmp_path / "m")


def test_a_checkpoint_of_trained_tensors_loads_over_its_towers(
    tiny_model: LoadedModel, glus: Glus, tmp_path: Path
) -> None:
    model = _with_towers(tiny_model, glus, tmp_path / "towers")
    save_trained(tmp_path / "trained", model, _randomised(glus))
    loaded = load_model(tmp_path / "trained")
    torch.testing.assert_close(loaded.glus.state_dict(), glus.state_dict(), rtol=0, atol=0)


def test_a_model_folder_can_be_moved_and_says_what_it_needs(
    tiny_model: LoadedModel, glus: Glus, tmp_path: Path
) -> None:
    _save(tmp_path / "here", tiny_model, glus)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "config.yaml",
        "tokenizer.model",
        "added_tokens.json",
        COMPLETE_FILE,
    }
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = load_model(tmp_path / "there")
    assert loaded.vocabulary.folder == tmp_path / "there"
    assert loaded.vocabulary.seg_id == tiny_model.vocabulary.seg_id
    assert loaded.config.frames == tiny_model.config.frames


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("damage", ["remove", "rename", "reshape", "add"])
def test_damaged_weights_are_an_error_that_names_the_tensor(
    tiny_model: LoadedModel, glus: Glus, tmp_path: Path, complete: bool, damage: str
) -> None:
    (_save if complete else save_trained)(tmp_path / "m", tiny_model, glus)
    file = tmp_path / "m" / (COMPLETE_FILE if complete else TRAINED_FILE)
    tensors, name = load_file(file), "seg_head.fc1.weight"
    if damage == "add":
        tensors["seg_head.fc3.weight"] = torch.zeros(2)
        name = "seg_head.fc3.weight"
    else:
        value = tensors.pop(name)
        if damage == "rename":
            tensors["seg_head.first.weight"] = value
        if damage == "reshape":
            tensors[name] = value[:-1].clone()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"do not fit.*{name}"):
        load_model(tmp_path / "m")


def test_identity_gamma_holds_over_a_complete_file(tiny_model: LoadedModel, glus: Glus, tmp_path: Path) -> None:
    """The file holds the trained scales; the switch is the config's."""
    config = copy.deepcopy(tiny_model.config)
    config.model.segmenter = replace(config.model.segmenter, fuser_gamma=FuserGamma.identity)
    _save(tmp_path / "m", tiny_model, glus, config=config)
    fuser = load_model(tmp_path / "m").glus.segmenter.sam.memory_encoder.fuser
    assert all(torch.equal(layer.gamma, torch.full_like(layer.gamma, 1e-6)) for layer in fuser.layers)
    kept = glus.segmenter.sam.memory_encoder.fuser
    assert all(layer.gamma.min() > 1e-3 for layer in kept.layers)


@pytest.mark.parametrize("gamma", list(FuserGamma))
def test_fine_tuning_starts_from_another_model(
    tiny_model: LoadedModel, glus: Glus, make_batch: BatchMaker, tmp_path: Path, gamma: FuserGamma
) -> None:
    """At step 0 the losses are that model's, as trained; what training saves loads over the same start."""
    source = copy.deepcopy(tiny_model.config)
    source.model.segmenter = replace(source.model.segmenter, fuser_gamma=gamma)
    _save(tmp_path / "published", tiny_model, _randomised(glus), config=source)
    config = copy.deepcopy(tiny_model.config)
    config.model.weights = str(tmp_path / "published")
    torch.manual_seed(5)
    start = build_glus(config.model).eval()
    objective = build_objective(LossConfig(weights={"seg": 1.0, "bce": 2.0, "dice": 0.5}), tiny_model.vocabulary.seg_id)
    batch = make_batch((2, 1), num_query=3)
    with torch.no_grad():
        ours, theirs = (
            objective(model(batch), batch, objective.counts([batch]), np.random.default_rng(0))
            for model in (start, glus.eval())
        )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=0)
    assert trainable_names(start) == trainable_names(glus)
    model = LoadedModel(start, tiny_model.vocabulary, config)
    save_trained(tmp_path / "trained", model, _randomised(start))
    again = load_model(tmp_path / "trained").glus
    torch.testing.assert_close(again.state_dict(), start.state_dict(), rtol=0, atol=0)


def test_precision_can_be_chosen_when_loading(tiny_model: LoadedModel, glus: Glus, tmp_path: Path) -> None:
    _save(tmp_path / "m", tiny_model, glus)
    loaded = load_model(tmp_path / "m", precision=Precision.bf16)
    assert {p.dtype for p in loaded.glus.parameters()} == {torch.bfloat16}


def test_building_twice_with_one_seed_gives_one_model(tiny_model: LoadedModel) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(build_glus(tiny_model.config.model).state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_saved_folder_appears_whole(tiny_model: LoadedModel, glus: Glus, tmp_path: Path) -> None:
    hidden_sibling(tmp_path / "m").mkdir()
    (hidden_sibling(tmp_path / "m") / "left over").write_text("from a killed run")
    _save(tmp_path / "m", tiny_model, glus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert not (tmp_path / "m" / "left over").exists()


def test_find_model_folder_takes_the_newest_checkpoint(tmp_path: Path) -> None:
    for step in ("step_9", "step_10", "step_11.tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        for name in (CONFIG_FILE, COMPLETE_FILE):
            (tmp_path / "checkpoints" / step / name).touch()
    assert find_model_folder(tmp_path).name == "step_10"
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a model folder"):
        find_model_folder(tmp_path / "other")
    for name in (CONFIG_FILE, COMPLETE_FILE):
        (tmp_path / "other" / name).touch()
    assert find_model_folder(tmp_path / "other") == tmp_path / "other"
