"""What people have in place of a model is told by name, with the command that helps, and never is code to be run."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glus.config import ModelConfig
from glus.models.foreign import check_starting_weights, how_to_get
from glus.models.glus import Glus
from glus.models.hub import find_model
from glus.models.pretrained import LoadedModel, find_model_folder, load_model, save_model
from glus.models.release import read_release
from glus.models.weights import MisfitError, read_tensors
from glus.tokens import open_vocabulary
from tests.conftest import load_release, tiny_segmenter
from tests.released_layout import glus_tensors, rewrite_weights, write_settings, write_weights


def test_all_missing_weights_are_named_at_once_with_what_gets_them(tmp_path: Path) -> None:
    model = ModelConfig()
    model.llm.tokenizer = model.llm.weights = f"{tmp_path}/LISA-7B-v1"
    model.clip.weights, model.segmenter.weights = (
        f"{tmp_path}/clip-vit-large-patch14",
        f"{tmp_path}/sam2_hiera_large.pt",
    )
    Path(model.clip.weights).mkdir()
    with pytest.raises(FileNotFoundError) as error:
        check_starting_weights(model)
    assert str(error.value).splitlines() == [
        "missing weights:",
        f"  model.llm.tokenizer={tmp_path}/LISA-7B-v1",
        f"  model.llm.weights={tmp_path}/LISA-7B-v1",
        f"  model.segmenter.weights={tmp_path}/sam2_hiera_large.pt",
        "  they come by",
        f"  hf download xinlai/LISA-7B-v1 --local-dir {tmp_path}/LISA-7B-v1",
        f"  curl -L --create-dirs -o {tmp_path}/sam2_hiera_large.pt "
        "https://dl.fbaipublicfiles.com/segment_anything_2/072824/sam2_hiera_large.pt",
    ]
    assert (
        how_to_get("weights/shapes/clip") == how_to_get("weights/shapes/sam2.pt") == "glus towers output=weights/shapes"
    )
    assert how_to_get("weights/mine") == ""
    model.weights, model.llm.tokenizer = "glus_shapes", str(tmp_path)
    check_starting_weights(model)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476\n"
PAGE = '\ufeff\n<!DOCTYPE html>\n<html lang="en"></html>'
MESSAGES = {
    POINTER: "it is a Git LFS pointer, not the file itself: run git lfs pull in {folder}",
    PAGE: "it is a web page or a server's message, not the file itself, and begins with '<!DOCTYPE html>'",
    '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "it is a web page or a server's message",
    '{"error":"Repository not found"}': "Repository not found",
    "Entry not found": "'Entry not found'",
    "": "it is empty: get it again",
}
UNSAFE = re.compile("weights_only|safe_globals|trust_remote_code|pickle.load")


def assert_named(message: str, error: pytest.ExceptionInfo[Exception]) -> None:
    assert message in str(error.value)
    assert not UNSAFE.search(str(error.value))
    assert error.value.__cause__ is None or not UNSAFE.search(str(error.value.__cause__))


@pytest.mark.parametrize("text", MESSAGES, ids=lambda text: text.strip("\ufeff\n")[:9])
@pytest.mark.parametrize(
    "name", ["pytorch_model-00002-of-00002.bin", "tokenizer.model", "config.json", "tower", "index"]
)
def test_what_stands_in_place_of_a_file_is_named(released_copy: Path, name: str, text: str) -> None:
    others = {"tower": "../clip/pytorch_model.bin", "index": "pytorch_model.bin.index.json"}
    file = (released_copy / others.get(name, name)).resolve()
    file.write_text(text)
    message = MESSAGES[text].format(folder=file.parent)
    if name in ("config.json", "index") and text in ("", "Entry not found", '{"error":"Repository not found"}'):
        message = str(file)  # which is no JSON of ours
    with pytest.raises(ValueError, match=re.escape(file.name)) as error:
        load_release(released_copy, tiny_segmenter())
    assert_named(message, error)


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize("text", MESSAGES, ids=lambda text: text.strip("\ufeff\n")[:9])
def test_what_stands_in_place_of_weights_is_named(tmp_path: Path, ending: str, text: str) -> None:
    (tmp_path / f"w.{ending}").write_text(text)
    with pytest.raises(ValueError, match=rf"w\.{ending} do not decode") as error:
        read_tensors(tmp_path / f"w.{ending}")
    assert_named(MESSAGES[text].format(folder=tmp_path), error)


@pytest.mark.parametrize("text", [*MESSAGES, "[]", '{"added_tokens": 1}'], ids=lambda text: text.strip("\ufeff\n")[:9])
def test_what_stands_in_place_of_a_tokenizer_json_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        open_vocabulary(tmp_path)
    if text in (POINTER, PAGE, ""):
        assert_named(MESSAGES[text].format(folder=tmp_path), error)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{file} is not text in utf-8"):
        open_vocabulary(tmp_path)


def test_torchs_advice_to_run_what_a_file_holds_is_not_passed_on(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "arguments": argparse.Namespace(lr=1)}, tmp_path / "a.ckpt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "b.pt"))
    (tmp_path / "c.bin").write_bytes(bytes(range(200, 256)))
    for name, message in (
        ("a.ckpt", "it holds a argparse.Namespace, and only tensors are read"),
        ("b.pt", ""),
        ("c.bin", ""),
    ):
        with pytest.raises(ValueError, match=rf"{name} do not decode") as error:
            read_tensors(tmp_path / name)
        assert_named(message, error)
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "d.pt")
    with pytest.raises(ValueError, match=r"d\.pt holds no state dict .* but \['optimizer', 'epoch'\]"):
        read_tensors(tmp_path / "d.pt")


FOLDERS = {
    "adapter_config.json": "LoRA adapter without its model; save what peft's merge_and_unload",
    "adapter_model.safetensors": "LoRA adapter without its model",
    "global_step500/mp_rank_00_model_states.pt": "zero_to_fp32.py joins its shards: .*zero_to_fp32 {folder} OUTPUT",
    "global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt": "zero_to_fp32.py joins",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "zero_to_fp32.py joins its .*zero_to_fp32 {folder.parent} ",
    "pytorch_model_fsdp_0/__0_0.distcp": "dcp_to_torch {folder}/pytorch_model_fsdp_0 OUTPUT.pt",
    "consolidated.00.pth": "convert_llama_weights_to_hf.py",
    "ggml-model-q4_0.gguf": "ggml-model-q4_0.gguf is another program's",
    "model.safetensors.part": "model.safetensors.part is half a download",
    "sam2_hiera_large.pt": "it holds sam2_hiera_large.pt: if these are the weights, name the file itself",
    "snapshots/3f2a/config.json": "models lie further inside, such as {folder}/snapshots/3f2a",
    "config.json": "its weights are not there; hf download gets them, or git lfs pull",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_something_else_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "given"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}")
    message = FOLDERS[name].format(folder=folder)
    for read in (lambda: read_release(folder, tiny_segmenter()), lambda: read_tensors(folder)):
        with pytest.raises(FileNotFoundError, match=rf"no \*\.safetensors or .* in {folder}.*{message}"):
            read()
    with pytest.raises(FileNotFoundError, match=rf"weights={folder}: neither a model folder .*{message}"):
        find_model_folder(folder)
    with pytest.raises(FileNotFoundError, match=message):
        find_model(folder)


Wrapped = dict[str, torch.Tensor]


def wrap(raw: Wrapped, kind: str) -> Wrapped:
    if kind == "middle":
        return {name.replace("self_attn.", "self_attn._orig_mod."): value for name, value in raw.items()}
    return {f"{kind}{name}": value for name, value in raw.items()}


@pytest.mark.parametrize(
    "kind", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "base_model.model.", "middle", "net."]
)
def test_names_of_wrappers_are_told_with_a_command_that_takes_them_away(
    merged_glus: Glus, tiny_model: LoadedModel, released: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "wrapped"
    write_settings(folder, merged_glus, tiny_model.vocabulary)
    shutil.copytree(released.parent / "clip", tmp_path / "clip")
    raw = glus_tensors(merged_glus)
    write_weights(folder, wrap(raw, kind), "bin shards")
    with pytest.raises(MisfitError) as error:
        load_release(folder, tiny_segmenter())
    command = re.search(r'by: (python -c ".*")', str(error.value))
    assert command, str(error.value)
    assert repr("_orig_mod." if kind == "middle" else kind) in str(error.value)
    python = command[1].replace("python", sys.executable, 1)
    subprocess.run(python, shell=True, check=True, cwd=tmp_path, timeout=300)
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    state = load_release(folder, tiny_segmenter()).glus.state_dict()
    torch.testing.assert_close(state, merged_glus.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"base_model.model.{name}.lora_A.default.weight", "peft's merge_and_unload"),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), "peft's merge_and_unload"),
        (lambda name: f"language_model.{name}", "LLaVA as transformers writes it: take the original layout"),
        (lambda name: name.replace("model.", "model.language_model.", 1), "LLaVA as transformers writes it"),
        (lambda name: name.replace("proj.weight", "proj.qweight"), "quantised weights"),
        (
            lambda name: name.replace("model.layers", "layers").replace("self_attn.q_proj", "attention.wq"),
            "Meta's layout",
        ),
    ],
)
def test_names_of_other_layouts_are_told(released_copy: Path, change: Any, message: str) -> None:
    def rename(raw: dict[str, torch.Tensor]) -> None:
        for name in [name for name in raw if name.startswith("model.layers.")]:
            raw[change(name)] = raw.pop(name)

    rewrite_weights(released_copy, rename)
    with pytest.raises(MisfitError, match=message):
        load_release(released_copy, tiny_segmenter())


def test_what_zero_3_leaves_of_tensors_is_told(released_copy: Path) -> None:
    rewrite_weights(released_copy, lambda raw: raw.update({name: torch.zeros(0) for name in raw if "norm" in name}))
    with pytest.raises(MisfitError, match=r"ZeRO-3 left empty tensors; .*zero_to_fp32"):
        load_release(released_copy, tiny_segmenter())


def test_published_weights_are_told_to_be_converted(
    released_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "published weights become one by python tools/convert_weights.py --weights"
    with pytest.raises(FileNotFoundError, match=f"weights={released_copy}: neither .*{command} {released_copy} "):
        load_model(released_copy)
    file = released_copy / "pytorch_model-00001-of-00002.bin"
    for find in (load_model, find_model, lambda given: read_release(given, tiny_segmenter())):
        with pytest.raises(FileNotFoundError, match=f"it is a file.? give its folder, .*{released_copy}"):
            find(file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{command} xinlai/LISA-7B-v1 --output"):
        load_model("xinlai/LISA-7B-v1")
    with pytest.raises(FileNotFoundError, match="hf download openai/clip --local-dir weights/clip"):
        read_tensors("openai/clip")
    (tmp_path / "outputs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"weights=outputs/typo: neither .* nor a run with checkpoints/$"):
        load_model("outputs/typo")


def test_our_own_folder_is_told_from_published_ones(tiny_model: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    save_model(folder, tiny_model.glus.state_dict(), tiny_model.config, tiny_model.vocabulary, metadata={})
    with pytest.raises(FileNotFoundError, match=f"it is a file; give its folder, weights={folder}"):
        load_model(folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{folder} is a run or model folder of GLUS, which is used as it is"):
        read_release(folder, tiny_segmenter())
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")  # lies beside, and is left alone
    load_model(folder)
    file = folder / "config.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    load_model(folder)
    for text, message in {
        "model: [": "config.yaml is no YAML",
        "model: 1\n\t- 2": "config.yaml is no YAML",
        "- model": "config.yaml: it holds no fields",
        "12": "config.yaml is no YAML",
        "[" * 5000: "config.yaml is no YAML",
        "models: {}": "config.yaml: unknown config key 'models'",
        POINTER: f"git lfs pull in {folder}",
        PAGE: "it is a web page",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither a model folder \(config\.yaml and model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("tokenizer.model", "transformers 5 saves instead, is not read: .*hf download"),
        ("added_tokens.json", "made of tokenizer.json"),
    ],
)
def test_a_tokenizer_of_transformers_5_is_told(released_copy: Path, absent: str, message: str) -> None:
    (released_copy / absent).unlink()
    with pytest.raises(FileNotFoundError, match=r"side by side$"):
        read_release(released_copy, tiny_segmenter())
    (released_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"has no {absent}.*{message}"):
        read_release(released_copy, tiny_segmenter())


def test_the_added_tokens_can_be_made_as_the_message_says(released_copy: Path) -> None:
    file = released_copy / "added_tokens.json"
    added = json.loads(file.read_text())
    listed = [{"id": number, "content": token} for number, token in enumerate(["<unk>", "<s>", "</s>"])]
    listed += [{"id": number, "content": token} for token, number in added.items()]
    (released_copy / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_release(released_copy, tiny_segmenter())
    command = str(error.value).partition("in that folder: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=released_copy, timeout=60)
    assert json.loads(file.read_text()) == added
