"""Training from LISA: what is taken of it, what is not, and that any damage stops with its name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glus.config import FuserGamma, ModelConfig, SegHeadInit
from glus.models.build import trainable_names
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel, build_glus, load_parts
from glus.models.release import build_release, read_release
from glus.models.weights import MisfitError
from tests.conftest import load_release, tiny_segmenter
from tests.edits import edit_json
from tests.merging import merge_lora
from tests.released_layout import SAM1_NAMES, lisa_tensors, write_checkpoint, write_weights


@pytest.fixture(scope="module")
def lisa(merged_glus: Glus, tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LISA's layout; SAM2 in a file beside it."""
    folder = tmp_path_factory.mktemp("lisa") / "LISA-7B-v1"
    write_checkpoint(folder, lisa_tensors(merged_glus), merged_glus, tiny_model.vocabulary)
    torch.save({"model": merged_glus.segmenter.sam.state_dict()}, folder.parent / "sam2.pt")
    return folder


@pytest.fixture
def start(tiny_model: LoadedModel, lisa: Path) -> ModelConfig:
    """Training from it, the [SEG] head at random."""
    config = copy.deepcopy(tiny_model.config.model)
    config.llm.weights = str(lisa)
    config.segmenter.weights = str(lisa.parent / "sam2.pt")
    config.clip.weights = str(lisa.parent / "clip")
    config.seg_head_init = SegHeadInit.random
    return config


@pytest.mark.parametrize("init", list(SegHeadInit))
def test_training_starts_from_lisa_and_sam2(start: ModelConfig, merged_glus: Glus, init: SegHeadInit) -> None:
    start.seg_head_init = init
    torch.manual_seed(11)
    untouched = build_glus(start, load_weights=False).seg_head.state_dict()
    torch.manual_seed(11)
    glus = build_glus(start)
    assert any(".lora_" in name for name in trainable_names(glus))
    merge_lora(glus.mllm.llama)
    expected = merged_glus.state_dict()
    for name, value in glus.state_dict().items():
        if name.startswith("seg_head.") and init is SegHeadInit.random:
            assert torch.equal(value, untouched[name.removeprefix("seg_head.")]), name
            assert not torch.equal(value, expected[name]), name
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("init", list(SegHeadInit))
def test_what_is_not_taken_of_lisa_is_counted(start: ModelConfig, merged_glus: Glus, init: SegHeadInit) -> None:
    start.seg_head_init = init
    start.llm.lora_rank, start.trainable = 0, []
    reports = load_parts(build_glus(start, load_weights=False), start)
    report = reports["model.llm.weights"]
    head = {"LISA's [SEG] head (model.seg_head_init=random)": 4} if init is SegHeadInit.random else {}
    frequencies = {"rotary frequencies (inv_freq), computed here": 2}
    assert report.dropped == frequencies | {"LISA's SAM-1": len(SAM1_NAMES)} | head
    language = len(merged_glus.mllm.llama.state_dict()) + 2  # and the projector
    assert report.matched == language + (4 if init is SegHeadInit.lisa else 0)
    assert reports["model.segmenter.weights"].matched == len(merged_glus.segmenter.sam.state_dict())
    assert reports["model.clip.weights"].matched == len(merged_glus.mllm.clip.vision_model.state_dict())


def test_lisa_and_sam2_make_one_model(lisa: Path, merged_glus: Glus) -> None:
    segmenter = tiny_segmenter(weights=str(lisa.parent / "sam2.pt"), fuser_gamma=FuserGamma.identity)
    loaded, reports = build_release(read_release(lisa, segmenter, seg_head_init=SegHeadInit.lisa))
    assert all(report.is_clean for report in reports.values())
    fuser = "segmenter.sam.memory_encoder.fuser.layers."
    for name, value in merged_glus.state_dict().items():
        if name.startswith(fuser) and name.endswith("gamma"):
            value = torch.full_like(value, 1e-6)
        assert torch.equal(loaded.glus.state_dict()[name], value), name


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda raw: raw.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.mm_projector.bias"), "1 missing.*missing: model.mm_projector.bias"),
        (without("model.norm.weight"), "1 missing.*missing: model.norm.weight"),
        (without("model.text_hidden_fcs.0.2.bias"), "1 missing.*missing: model.text_hidden_fcs.0.2.bias"),
        (lambda raw: raw.update(extra=torch.zeros(1)), "1 unexpected.*unexpected: extra"),
        (
            lambda raw: raw.update({"model.visual_model.image_encoder.neck.convs.0.conv.bias": torch.zeros(1)}),
            r"unexpected: model\.visual_model\.image_encoder\.neck\.convs.*\(it holds SAM2, as a merged GLUS does",
        ),
        (lambda raw: raw.update({"model.norm.weight": torch.zeros(1)}), r"model.norm.weight is \(1,\)"),
        (
            without("model.layers.1.self_attn.rotary_emb.inv_freq"),
            r"inv_freq of 1 layers, expected 2; see model\.layers\.1",
        ),
    ],
)
def test_damaged_lisa_stops_with_a_message(
    start: ModelConfig, merged_glus: Glus, tmp_path: Path, change: Any, message: str
) -> None:
    raw = lisa_tensors(merged_glus)
    change(raw)
    write_weights(tmp_path, raw, "bin shards")
    start.seg_head_init = SegHeadInit.lisa
    start.llm.weights = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_glus(start)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", 1e-5, r"rms_norm_eps=1e-06, but .*config\.json says rms_norm_eps=1e-05: set .*=1e-05"),
        ("hidden_size", 65, "model.llm.architecture.hidden_size=64, but"),
        ("mm_vision_select_layer", -1, "model.clip.select_layer=-2, but .*says mm_vision_select_layer=-1"),
    ],
)
def test_settings_that_contradict_lisas_config_are_refused(
    start: ModelConfig, lisa: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    start.llm.weights = str(shutil.copytree(lisa, tmp_path / "LISA"))
    edit_json(tmp_path / "LISA" / "config.json", lambda content: content.update({key: value}))
    start.llm.architecture["rms_norm_eps"] = 1e-6
    with pytest.raises(ValueError, match=message):
        build_glus(start)


@pytest.mark.parametrize("part", ["clip", "segmenter", "llm"])
def test_a_folder_without_weights_is_an_error_that_names_the_key(start: ModelConfig, tmp_path: Path, part: str) -> None:
    getattr(start, part).weights = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"model\.{part}\.weights={tmp_path}: no \*\.safetensors or"):
        build_glus(start)


def test_a_lisa_head_needs_lisa(tiny_model: LoadedModel) -> None:
    config = copy.deepcopy(tiny_model.config.model)
    config.seg_head_init = SegHeadInit.lisa
    with pytest.raises(ValueError, match=r"model\.seg_head_init=lisa: set model\.llm\.weights"):
        build_glus(config)


def test_lisa_is_no_merged_glus(lisa: Path) -> None:
    with pytest.raises(MisfitError, match=r"unexpected: model\.visual_model\..*\(it holds SAM-1, as LISA-7B-v1 does"):
        load_release(lisa, tiny_segmenter())


def test_a_bare_llama_and_one_with_a_projector_start_too(start: ModelConfig, merged_glus: Glus, tmp_path: Path) -> None:
    """What the small model starts from: no [SEG] head, no rotary frequencies, perhaps no projector."""
    llama = ("model.layers", "model.norm", "model.embed", "lm_head")
    raw = {name: value for name, value in lisa_tensors(merged_glus).items() if "inv_freq" not in name}
    for with_projector in (False, True):
        parts = (*llama, "model.mm_projector") if with_projector else llama
        folder = tmp_path / str(with_projector)
        folder.mkdir()
        write_weights(folder, {name: value for name, value in raw.items() if name.startswith(parts)}, "safetensors")
        start.llm.weights = str(folder)
        glus = build_glus(start)
        assert torch.equal(glus.mllm.llama.lm_head.weight, merged_glus.mllm.llama.lm_head.weight)
        assert torch.equal(glus.mllm.projector.weight, merged_glus.mllm.projector.weight) is with_projector
