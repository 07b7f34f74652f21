"""Every way in which a model gets its weights: no tensor is left without values, none is in memory for nothing."""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glus.config import ModelConfig, Precision
from glus.models.build import trainable_names
from glus.models.glus import Glus
from glus.models.pretrained import (
    LoadedModel,
    build_glus,
    load_model,
    loaded_names,
    merged_tensors,
    save_model,
    under_adapters,
)
from glus.models.release import build_release, read_release
from glus.models.weight_files import GB, LoadProgress
from glus.models.weights import ON_DISK, LoadReport, MisfitError, Source
from tests.conftest import tiny_segmenter
from tests.merging import merge_lora, merge_new_rows
from tests.models.conftest import save_trained
from tests.released_layout import lisa_tensors, write_checkpoint

NEW_ROWS = ["lora", "embeddings_new_rows", "lm_head_new_rows", "seg_head"]


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody writes to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def parts(tiny_model: LoadedModel, merged_glus: Glus, tmp_path: Path) -> ModelConfig:
    """LISA, CLIP and SAM2 in files, which training starts from."""
    lisa = write_checkpoint(tmp_path / "p" / "LISA", lisa_tensors(merged_glus), merged_glus, tiny_model.vocabulary)
    torch.save({"model": merged_glus.segmenter.sam.state_dict()}, lisa.parent / "sam2.pt")
    config = copy.deepcopy(tiny_model.config.model)
    config.llm.weights, config.clip.weights = str(lisa), str(lisa.parent / "clip")
    config.segmenter.weights = str(lisa.parent / "sam2.pt")
    config.trainable = NEW_ROWS
    return config


@pytest.fixture
def folder(tiny_model: LoadedModel, tmp_path: Path) -> Path:
    """A complete model folder with adapters and new rows, all of which matter."""
    config = copy.deepcopy(tiny_model.config)
    config.model.trainable = NEW_ROWS
    torch.manual_seed(7)
    glus = build_glus(config.model)
    with torch.no_grad():
        for parameter in glus.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(tmp_path / "complete", glus.state_dict(), config, tiny_model.vocabulary, metadata={})
    return tmp_path / "complete"


def checkpoint_over_parts(parts: ModelConfig, model: LoadedModel, folder: Path) -> Path:
    """What training from ``parts`` leaves."""
    config = copy.deepcopy(model.config)
    config.model = parts
    save_trained(folder, LoadedModel(model.glus, model.vocabulary, config), build_glus(parts))
    return folder


Way = Callable[[ModelConfig, Path, Path, LoadedModel, Path], Glus]
"""From parts, a folder, a published checkpoint, a model and room on the disk, to a network."""
WAYS: dict[str, Way] = {
    "at random": lambda parts, folder, released, model, room: build_glus(model.config.model),
    "parts": lambda parts, folder, released, model, room: build_glus(parts),
    "a start": lambda parts, folder, released, model, room: build_glus(_with_start(parts, folder)),
    "a folder": lambda parts, folder, released, model, room: load_model(folder).glus,
    "a folder in bf16": lambda parts, folder, released, model, room: load_model(folder, Precision.bf16).glus,
    "a checkpoint": lambda parts, folder, released, model, room: (
        load_model(checkpoint_over_parts(parts, model, room / "step")).glus
    ),
    "a release": lambda parts, folder, released, model, room: (
        build_release(read_release(released, tiny_segmenter()))[0].glus
    ),
    "a release with adapters": lambda parts, folder, released, model, room: _release_with_adapters(released),
    "LISA": lambda parts, folder, released, model, room: (
        build_release(read_release(str(parts.llm.weights), tiny_segmenter(weights=parts.segmenter.weights)))[0].glus
    ),
}


def _with_start(parts: ModelConfig, folder: Path) -> ModelConfig:
    config = copy.deepcopy(parts)
    config.weights = str(folder)
    return config


def _release_with_adapters(released: Path) -> Glus:
    checkpoint = read_release(released, tiny_segmenter())
    checkpoint.config.llm.lora_rank = 2
    return build_release(checkpoint)[0].glus


def tensors_of(glus: Glus) -> dict[str, torch.Tensor]:
    """All that a network computes with, also what is no parameter and no buffer."""
    found: dict[str, torch.Tensor] = {**dict(glus.named_parameters()), **dict(glus.named_buffers())}
    for name, module in glus.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        found |= {f"{name}.{key}": value for key, value in plain.items()}
    return found


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_has_values(
    way: str, parts: ModelConfig, folder: Path, released: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    tensors = tensors_of(WAYS[way](parts, folder, released, tiny_model, tmp_path))
    rotary = [name for name in tensors if name.endswith("inv_freq")]
    assert rotary
    assert all(tensors[name].dtype is torch.float32 for name in rotary)
    assert any(name.endswith("position_ids") for name in tensors)
    for name, tensor in tensors.items():
        assert tensor.device.type == "cpu", name
        assert tensor.isfinite().all(), name


def mapped_names(glus: Glus, place: Path) -> set[str]:
    """Names of the tensors whose memory is that of files below ``place``."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if str(place) in line[-1]]
    state = glus.state_dict()
    return {name for name, value in state.items() if any(low <= value.data_ptr() < high for low, high in ranges)}


def test_what_is_trained_or_cast_has_memory_of_its_own(parts: ModelConfig, folder: Path, tmp_path: Path) -> None:
    glus = build_glus(parts)
    mapped = mapped_names(glus, tmp_path)
    frozen = ("mllm.clip.", "mllm.llama.model.layers.", "mllm.llama.model.norm.")
    assert {name for name in glus.state_dict() if name.startswith(frozen) and "lora" not in name} <= mapped
    assert not mapped & set(trainable_names(glus))
    parts.trainable = ["embeddings", "llm"]
    assert not any(name.startswith("language.") for name in mapped_names(build_glus(parts), tmp_path))
    assert not mapped_names(load_model(folder, Precision.bf16).glus, tmp_path)


def test_a_file_may_be_deleted_or_replaced_under_a_model(folder: Path, tiny_model: LoadedModel) -> None:
    glus = load_model(folder).glus
    assert mapped_names(glus, folder)
    before = {name: value.clone() for name, value in glus.state_dict().items()}
    file = folder / "model.safetensors"
    file.with_suffix(".new").write_bytes(bytes(file.stat().st_size))
    file.with_suffix(".new").replace(file)
    file.unlink()
    torch.testing.assert_close(glus.state_dict(), before, rtol=0, atol=0)


def test_a_model_on_disk_takes_no_memory_and_merges_as_one_in_memory_does(folder: Path) -> None:
    on_disk = load_model(folder, as_trained=True, target=ON_DISK)
    assert mapped_names(on_disk.glus, folder) == on_disk.glus.state_dict().keys()
    live = load_model(folder, as_trained=True).glus
    merge_lora(live.mllm.llama)
    merge_new_rows(live.mllm.llama)
    tensors = merged_tensors(on_disk)
    expected = live.state_dict()
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(tensors[name].read(), value), name  # type: ignore[union-attr]


def test_a_start_is_merged_in_its_own_precision(folder: Path, tiny_model: LoadedModel) -> None:
    config = copy.deepcopy(tiny_model.config.model)
    config.weights, config.precision, config.llm.lora_rank, config.trainable = str(folder), Precision.bf16, 0, []
    start = load_model(folder).glus
    merge_lora(start.mllm.llama)
    merge_new_rows(start.mllm.llama)
    glus = build_glus(config)
    for name, value in start.state_dict().items():
        assert torch.equal(glus.state_dict()[name], value.bfloat16()), name


def test_renaming_weights_for_adapters_keeps_none_that_is_taken(tiny_model: LoadedModel) -> None:
    source = Source("x", {name: torch.zeros(1) for name in loaded_names(tiny_model.glus)}, (), "the file's {}".format)
    before = weakref.ref(source)
    renamed = under_adapters(tiny_model.glus, source)
    del source
    assert before() is None
    name = next(name for name in renamed.tensors if ".base_layer." in name)
    assert renamed.label(name) == f"the file's {name.replace('.base_layer', '')}"


def test_an_error_can_travel_to_other_processes() -> None:
    error = MisfitError("x.bin", LoadReport(1, {"missing": ("a",)}), "why")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.report) == (str(error), error.report)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_load_tells_how_far_it_is(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), iter(range(0, 1000, 4))
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("glus.models.weight_files.time", clock)
    progress = LoadProgress("weights/x", 10, 10 * GB)
    for _ in range(10):
        progress.advance(GB)
    lines = re.split(r"[\r\n]+", stream.getvalue().strip())
    assert len(lines) == (10 if is_terminal else 4)  # every 12 seconds, and the last
    assert lines[-1] == "weights/x: 10.0 of 10.0 GB, 10 of 10 tensors, 40 s"
    assert stream.getvalue().count("\n") == (1 if is_terminal else 4)


def test_a_short_load_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LoadProgress("x", 1, GB - 1)
    progress.advance(GB - 1)
    assert capsys.readouterr().err == ""
