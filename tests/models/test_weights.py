"""Reading, strict loading and writing of tensors."""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from glus.models.release_layout import CLIP_KEYS, KeyMap
from glus.models.weight_files import LazyTensor, write_pickle, write_shards, write_tensors
from glus.models.weights import IN_MEMORY, LoadReport, MisfitError, Source, load_into, read_tensors


def load_strict(
    module: nn.Module, tensors: dict[str, torch.Tensor], source: str, only: list[str] | None = None
) -> LoadReport:
    """``load`` of tensors that are there already and that are kept, into a module on the CPU."""
    return load_into(module, lambda: Source(source, dict(tensors), only), IN_MEMORY)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_fitting_state_is_copied_and_cast() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    tensors = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    report = load_strict(module, tensors, "somewhere")
    assert (report.matched, report.is_clean) == (2, True)
    assert str(report) == "2 matched, 0 missing, 0 unexpected, 0 wrong shape"
    assert module.weight.dtype is torch.bfloat16
    assert torch.equal(module.weight, tensors["weight"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "1 missing.*missing: bias"),
        ({"scale": torch.zeros(1)}, "1 unexpected.*unexpected: scale"),
        ({"weight": torch.zeros(3, 2)}, r"1 wrong shape.*weight is \(3, 2\), expected \(2, 3\)"),
        ({"bias": None, "biass": torch.zeros(2)}, "missing: bias; unexpected: biass"),
    ],
)
def test_anything_else_is_an_error_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    module = nn.Linear(3, 2)
    before = _state(module)
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2), **change}
    with pytest.raises(ValueError, match=f"weights of somewhere do not fit: .*{message}"):
        load_strict(module, {name: value for name, value in tensors.items() if value is not None}, "somewhere")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_only_names_what_must_be_there() -> None:
    module = nn.Linear(3, 2)
    weight = module.weight.detach().clone()
    load_strict(module, {"bias": torch.ones(2)}, "x", only=["bias"])
    assert torch.equal(module.bias, torch.ones(2))
    assert torch.equal(module.weight, weight)
    with pytest.raises(ValueError, match="unexpected: weight"):
        load_strict(module, {"bias": torch.ones(2), "weight": weight}, "x", only=["bias"])


def test_long_lists_are_cut_short() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(
        ValueError, match=r"8 missing.*missing: 0\.bias, 0\.weight, 1\.bias, 1\.weight, 2\.bias, \.\.\."
    ):
        load_strict(module, {}, "x")


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_every_file_type_is_read(tmp_path: Path, name: str, nested: bool) -> None:
    tensors = {"a.b": torch.randn(2, 3), "c": torch.arange(4)}
    if name.endswith("safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save({"model": tensors} if nested else tensors, tmp_path / name)
    found = read_tensors(tmp_path / name)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def test_a_folder_is_all_its_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    assert read_tensors(tmp_path).keys() == {"a", "b"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors or pytorch_model\*\.bin file in .*empty"):
        read_tensors(tmp_path / "empty")


def test_a_missing_file_and_one_without_tensors_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.pt"):
        read_tensors(tmp_path / "absent.pt")
    torch.save({"step": 3}, tmp_path / "no.pt")
    with pytest.raises(ValueError, match=r"no\.pt holds no state dict"):
        read_tensors(tmp_path / "no.pt")


def test_a_pickle_that_runs_code_is_not_read(tmp_path: Path) -> None:
    torch.save({"a": Path("anything but a tensor")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"weights .*bad\.pt do not decode"):
        read_tensors(tmp_path / "bad.pt")


@pytest.mark.parametrize("form", ["w.safetensors", "w.pt", "before torch 1.6.pt"])
def test_a_file_that_was_cut_short_is_an_error_that_names_it(tmp_path: Path, form: str) -> None:
    """Wherever it was cut: torch raises something else in the head, the pickle, the data and the directory."""
    tensors, file = {f"layer.{i}": torch.full((30, 7), float(i)) for i in range(20)}, tmp_path / form
    if form.endswith("safetensors"):
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "w.pt")
    assert read_tensors(file).keys() == tensors.keys()
    content = file.read_bytes()
    for length in (*range(0, len(content), 97), 7, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"weights .*{form} do not decode"):
            read_tensors(file)


def test_written_tensors_are_read_back_exactly_with_their_metadata(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"strided": base.T, "bf16": base.to(torch.bfloat16), "leaf": nn.Parameter(base)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"step": "12"})
    found = read_tensors(path)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert found["bf16"].dtype is torch.bfloat16
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "12"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("limit", [1000, 3_000_000])
@pytest.mark.parametrize(
    ("ending", "write"), [("safetensors", partial(write_tensors, metadata={})), ("bin", write_pickle)]
)
def test_tensors_that_do_not_fit_on_the_disk_leave_nothing(
    tmp_path: Path, ending: str, write: Callable[..., None], limit: int
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # as good as a full disk
    try:
        with pytest.raises(OSError, match=rf"cannot write .*x\.{ending}.*: .*File too large"):
            write(tmp_path / f"x.{ending}", {name: torch.zeros(500_000) for name in "abc"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_tensors_that_are_made_when_they_are_written_give_the_same_files(tmp_path: Path, ending: str) -> None:
    """Of several types, also parts of others; several shards; nothing else is left."""
    whole = torch.randn(40, 6)
    tensors = {"part": whole[3:9], "double": torch.randn(5).double(), "half": torch.randn(9, 2).half()}
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5), "flags": torch.tensor([True, False])}
    lazy = {name: LazyTensor.of(value.clone()).map(torch.clone) for name, value in tensors.items()}
    for folder, content in (("there", tensors), ("made", lazy)):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, content, ending, 150, {"source": "here"})
    for name, value in tensors.items():
        assert torch.equal(read_tensors(tmp_path / "made")[name], value), name
    files = {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == files
    assert sum(len(content) for content in files.values()) < 10_000
    assert len([name for name in files if name.endswith(ending)]) == 2


def test_one_lazy_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    def forget() -> None:
        nonlocal alive
        alive -= 1

    def make() -> torch.Tensor:
        nonlocal alive, most
        value = torch.zeros(1000)
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(value.untyped_storage(), forget)
        return value

    lazy = {name: LazyTensor(torch.Size([1000]), torch.float32, make).to(torch.float16) for name in "abcd"}
    write_shards(tmp_path, lazy, "safetensors", 10**9, {})
    write_shards(tmp_path, lazy, "bin", 10**9, {})
    assert (most, alive) == (1, 0)


def test_a_pickle_of_before_torch_1_6_is_read(tmp_path: Path) -> None:
    """It is no archive and cannot be mapped."""
    torch.save({"a": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    tensors = read_tensors(tmp_path / "old.bin")
    module = nn.Linear(3, 1, bias=False, device="meta")
    load_into(module, lambda: Source("old.bin", {"weight": tensors["a"][None]}), IN_MEMORY)
    (tmp_path / "old.bin").write_bytes(b"")
    assert torch.equal(module.weight, torch.ones(1, 3))


def test_values_that_the_modules_type_cannot_hold_are_refused() -> None:
    module = nn.Linear(2, 1, bias=False).half()
    with pytest.raises(MisfitError, match="weight holds 1 values that are NaN or infinite"):
        load_strict(module, {"weight": torch.tensor([[1.0, 1e6]])}, "x")


TOWER = {"embeddings.class_embedding": torch.zeros(2), "encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("form", ["transformers 5", "transformers 4", "whole CLIP"])
def test_clip_folders_of_every_form_give_the_vision_tower(tmp_path: Path, form: str) -> None:
    prefix = "" if form == "transformers 5" else "vision_model."
    tensors = {f"{prefix}{name}": value for name, value in TOWER.items()}
    if form != "transformers 5":
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(3)[None]
    if form == "whole CLIP":
        others = (
            "text_model.final_layer_norm.bias",
            "text_projection.weight",
            "visual_projection.weight",
            "logit_scale",
        )
        tensors |= {name: torch.zeros(1) for name in others}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = CLIP_KEYS.source(tmp_path, read_tensors(tmp_path))
    assert source.tensors.keys() == {f"mllm.clip.vision_model.{name}" for name in TOWER}
    assert not source.unknown
    assert list(source.dropped.values()) == {"transformers 5": [], "transformers 4": [1], "whole CLIP": [1, 4]}[form]


def test_tensors_are_called_as_the_file_spells_them() -> None:
    renamed = (("visual.", "net.visual."), ("model.visual.", "net.visual."), ("head.", "net.head."))
    for start in ("visual.", "model.visual."):
        source = KeyMap(renamed).source("x", {f"{start}a": torch.zeros(1)})
        assert source.label("net.visual.b") == f"{start}b"
        assert source.label("net.head.weight") == "head.weight"
        assert source.label("other") == "other"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(2, dtype=torch.int64), "is int64, expected floating point"),
        (torch.zeros(2, dtype=torch.bool), "is bool, expected floating point"),
        (torch.zeros(2, dtype=torch.complex64), "is complex64, expected floating point"),
        (torch.tensor([1.0, float("nan")]), "holds 1 values that are NaN or infinite"),
        (torch.tensor([float("-inf"), float("nan")]), "holds 2 values that are NaN or infinite"),
    ],
)
def test_values_that_are_no_weights_are_refused(value: torch.Tensor, problem: str) -> None:
    module = nn.Linear(3, 2)
    before = _state(module)
    with pytest.raises(MisfitError, match=f"1 matched.*1 bad values; bad values: bias {problem}"):
        load_strict(module, {"weight": torch.ones(2, 3), "bias": value}, "x")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_messages_use_the_files_names_and_count_what_was_dropped() -> None:
    module = nn.Linear(3, 2)
    tensors = {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}
    source = Source("x.bin", tensors, None, lambda name: f"model.{name}", {"old": 3}, ["z"], "why")
    with pytest.raises(MisfitError) as caught:
        load_into(module, lambda: source, IN_MEMORY)
    assert str(caught.value) == (
        "weights of x.bin do not fit: 0 matched, 1 missing, 2 unexpected, 1 wrong shape; dropped: 3 old; "
        "missing: model.bias; unexpected: model.scale, z; wrong shape: model.weight is (3, 2), expected (2, 3) (why)"
    )
    assert caught.value.report.table().splitlines() == [
        "matched            0",
        "dropped: old       3",
        "missing            1",
        "    model.bias",
        "unexpected         2",
        "    model.scale",
        "    z",
        "wrong shape        1",
        "    model.weight is (3, 2), expected (2, 3)",
    ]


def test_safetensors_are_preferred_and_other_pickles_ignored(tmp_path: Path) -> None:
    torch.save({"steps": 3}, tmp_path / "training_args.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_tensors(tmp_path)["a"], torch.zeros(1))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert torch.equal(read_tensors(tmp_path)["a"], torch.ones(1))


def test_shards_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00002-of-00003"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="mixes shards of several models"):
        read_tensors(tmp_path)


WHOLE = {"a": torch.ones(2), "b": torch.ones(1)}
PART = {"a": torch.zeros(2)}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476\n"
FORMS = {
    "safetensors": ["model.safetensors"],
    "bin": ["pytorch_model.bin"],
    **{
        f"{ending} shards": [*(f"{stem}-0000{n}-of-00002.{ending}" for n in (1, 2)), f"{stem}.{ending}.index.json"]
        for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin"))
    },
}
BESIDE: list[dict[str, Any]] = [
    {"adapter_config.json": {}, "adapter_model.safetensors": PART, "adapter_model.bin": PART},
    {"optimizer.bin": PART, "optimizer.safetensors": PART, "scheduler.bin": PART, "training_args.bin": PART},
    {"consolidated.00.pth": PART, "consolidated.safetensors": PART, "params.json": {}},
    {"mm_projector.bin": PART, "mm_projector.safetensors": PART, "exp_avg.safetensors": PART, "model_old.bin": PART},
    {"model-00001-of-00007.safetensors": PART, "pytorch_model-00003-of-00007.bin": PART},
    {"model.safetensors.index.json": {"weight_map": {"a": "model-00001-of-00007.safetensors"}}},
    {"pytorch_model.bin.index.json": {"weight_map": {"a": "pytorch_model-00001-of-00007.bin"}}},
    {"model.safetensors": LFS_POINTER},
    {"pytorch_model.bin": "<!DOCTYPE html>"},
]


def write_any(file: Path, content: object) -> None:
    """Tensors, text, or JSON."""
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    elif file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)


@pytest.mark.parametrize(
    ("form", "beside"),
    [
        pytest.param(form, beside, id=f"{form} and {next(iter(beside))}")
        for form, files in FORMS.items()
        for beside in BESIDE
        if not beside.keys() & set(files)
    ],
)
def test_whole_weights_are_found_whatever_lies_beside_them(
    tmp_path: Path, form: str, beside: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    files = FORMS[form]
    if len(files) == 1:
        beside = beside | {files[0]: WHOLE}
    else:
        shards = dict(zip(WHOLE, files[:2], strict=True))
        beside = beside | {file: {key: WHOLE[key]} for key, file in shards.items()} | {files[2]: {"weight_map": shards}}
    for name, content in beside.items():
        write_any(tmp_path / name, content)
    torch.testing.assert_close(read_tensors(tmp_path), WHOLE)
    assert all("read instead" in record.message for record in caplog.records)


def test_a_state_dict_is_found_where_lightning_and_deepspeed_keep_it(tmp_path: Path) -> None:
    torch.save({"state_dict": WHOLE, "epoch": 3}, tmp_path / "w.ckpt")
    torch.save({"module": WHOLE, "dp_world_size": 8}, tmp_path / "w.pt")
    for name in ("w.ckpt", "w.pt"):
        torch.testing.assert_close(read_tensors(tmp_path / name), WHOLE)
