"""tools/convert_weights.py: published files to a model folder and back, and what it prints when they do not fit."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glus.config import FuserGamma, Precision, SegHeadInit, SegmenterConfig
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel, load_model, save_model
from glus.models.weights import read_tensors
from tests.conftest import load_release, tiny_segmenter
from tests.released_layout import lisa_tensors, rewrite_weights, write_checkpoint
from tools.convert_weights import convert_weights, main, read_segmenter


def test_a_published_glus_becomes_a_model_folder(
    merged_glus: Glus, released_copy: Path, segmenter_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "ours"
    main(["--weights", str(released_copy), "--segmenter", str(segmenter_file), "--output", str(output)])
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    printed = [(line[0], int(line[1])) for line in lines if len(line) == 2]
    of_clip = len(merged_glus.mllm.clip.state_dict())
    others = len(merged_glus.state_dict()) - of_clip
    nothing = [("missing", 0), ("unexpected", 0), ("wrong shape", 0)]
    dropped = ("dropped: rotary frequencies (inv_freq), computed here", 2)
    assert printed == [("matched", others), dropped, *nothing, ("matched", of_clip), *nothing]
    shutil.rmtree(released_copy.parent)  # the folder needs nothing else
    loaded = load_model(output)
    torch.testing.assert_close(loaded.glus.state_dict(), merged_glus.state_dict(), rtol=0, atol=0)
    assert loaded.config.model.clip.weights is None
    assert (loaded.config.frames.num_context, loaded.config.inference.memory_stride) == (4, 3)


def test_stored_weights_may_be_rounded(released: Path, segmenter_file: Path, tmp_path: Path) -> None:
    arguments = ["--weights", str(released), "--segmenter", str(segmenter_file), "--output", str(tmp_path / "ours")]
    main([*arguments, "--dtype", "bf16"])
    assert {value.dtype for value in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}
    assert load_model(tmp_path / "ours").config.model.precision is Precision.fp32


def test_identity_is_a_setting_and_the_file_keeps_the_trained_scales(
    merged_glus: Glus, released: Path, tmp_path: Path
) -> None:
    convert_weights(str(released), tmp_path / "ours", tiny_segmenter(fuser_gamma=FuserGamma.identity))
    name = "segmenter.sam.memory_encoder.fuser.layers.0.gamma"
    assert torch.equal(load_file(tmp_path / "ours" / "model.safetensors")[name], merged_glus.state_dict()[name])
    loaded = load_model(tmp_path / "ours")
    assert loaded.config.model.segmenter.fuser_gamma is FuserGamma.identity
    assert set(loaded.glus.state_dict()[name].tolist()) == {torch.tensor(1e-6).item()}
    with pytest.raises(
        SystemExit, match=r"error: model\.segmenter\.fuser_gamma=identity has replaced the trained scales"
    ):
        main(["--to-release", "--weights", str(tmp_path / "ours"), "--output", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_there_and_back_gives_every_bit(released: Path, tmp_path: Path, form: str) -> None:
    convert_weights(str(released), tmp_path / "ours", tiny_segmenter())
    size = 200_000
    arguments = ["--to-release", "--weights", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]
    main([*arguments, "--format", form, "--shard-gb", str(size / 1e9)])
    shards = sorted((tmp_path / "back").glob(f"*.{form}"))
    index = json.loads(next((tmp_path / "back").glob("*.index.json")).read_text())
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    for shard in shards:
        tensors = read_tensors(shard)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= size
    raw, back = read_tensors(released), read_tensors(tmp_path / "back")
    torch.testing.assert_close(back, raw, rtol=0, atol=0)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in raw.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours"]


def test_a_folder_in_the_released_layout_is_complete(merged_glus: Glus, released_copy: Path, tmp_path: Path) -> None:
    """With its CLIP inside, and all that the authors' config.json states of sizes and tokens."""
    stated = json.loads((released_copy / "config.json").read_text())
    convert_weights(str(released_copy), tmp_path / "ours", tiny_segmenter())
    main(["--to-release", "--weights", str(tmp_path / "ours"), "--output", str(tmp_path / "back")])
    shutil.rmtree(released_copy.parent)
    again = load_release(tmp_path / "back", tiny_segmenter()).glus
    torch.testing.assert_close(again.state_dict(), merged_glus.state_dict(), rtol=0, atol=0)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in stated} == stated
    assert config["mm_vision_select_layer"] == -2
    assert (config["out_dim"], config["mm_hidden_size"], config["torch_dtype"]) == (32, 32, "float32")
    tower = read_tensors(tmp_path / "back" / "clip" / "pytorch_model.bin")
    assert all(name.startswith("vision_model.") for name in tower)
    crop = json.loads((tmp_path / "back" / "clip" / "preprocessor_config.json").read_text())["crop_size"]
    assert crop == {"height": 32, "width": 32}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())


def test_adapters_are_merged_on_the_way_back(tiny_model: LoadedModel, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {name: value.clone() for name, value in tiny_model.glus.state_dict().items()}
    name = "mllm.llama.model.layers.0.self_attn.q_proj"
    tensors[f"{name}.lora_B.default.weight"].normal_()
    save_model(tmp_path / "run", tensors, tiny_model.config, tiny_model.vocabulary, metadata={})
    main(["--to-release", "--weights", str(tmp_path / "run"), "--output", str(tmp_path / "back"), "--dtype", "fp32"])
    product = tensors[f"{name}.lora_B.default.weight"] @ tensors[f"{name}.lora_A.default.weight"]
    llm = tiny_model.config.model.llm
    expected = tensors[f"{name}.base_layer.weight"] + llm.lora_alpha / llm.lora_rank * product
    merged = read_tensors(tmp_path / "back")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("init", list(SegHeadInit))
def test_lisa_and_sam2_become_a_model_folder(
    merged_glus: Glus, tiny_model: LoadedModel, segmenter_file: Path, tmp_path: Path, init: SegHeadInit
) -> None:
    raw = lisa_tensors(merged_glus)
    lisa = write_checkpoint(tmp_path / "published" / "LISA", raw, merged_glus, tiny_model.vocabulary)
    sam2 = lisa.parent / "sam2_hiera_t.pt"
    torch.save({"model": merged_glus.segmenter.sam.state_dict()}, sam2)
    states = []
    for seed in ("0", "0", "1"):
        output = tmp_path / f"start{len(states)}"
        arguments = ["--weights", str(lisa), "--sam2", str(sam2), "--segmenter", str(segmenter_file)]
        main([*arguments, "--seg-head-init", init.value, "--seed", seed, "--output", str(output)])
        states.append(load_model(output).glus.state_dict())
    expected = merged_glus.state_dict()
    for name, value in expected.items():
        is_lisas = not name.startswith("seg_head.") or init is SegHeadInit.lisa
        assert torch.equal(states[0][name], value) is is_lisas, name
        assert torch.equal(states[1][name], states[0][name]), name
        assert torch.equal(states[2][name], states[0][name]) is is_lisas, name


def test_a_misfit_prints_the_whole_table_and_leaves_nothing(
    released_copy: Path, segmenter_file: Path, tmp_path: Path
) -> None:
    names = [name for name in read_tensors(released_copy) if name.startswith("model.visual_model.sam_prompt_encoder.")]

    def drop(raw: dict[str, torch.Tensor]) -> None:
        for name in raw.keys() & set(names):
            del raw[name]

    rewrite_weights(released_copy, drop)
    with pytest.raises(SystemExit) as stopped:
        main(["--weights", str(released_copy), "--segmenter", str(segmenter_file), "--output", str(tmp_path / "ours")])
    message = str(stopped.value)
    assert len(names) > 10
    assert all(f"    {name}\n" in message for name in names)
    assert re.search(rf"^missing +{len(names)}\n", message, re.MULTILINE)
    assert f"error: weights of {released_copy} do not fit" in message
    assert not (tmp_path / "ours").exists()


def test_an_existing_folder_is_refused(released: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    for direction in ([], ["--to-release"]):
        with pytest.raises(SystemExit, match=r"error: --output .*ours exists"):
            main(["--weights", str(released), "--output", str(tmp_path / "ours"), *direction])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to-release", "--sam2", "x.pt"], "--sam2 makes no sense with --to-release"),
        (["--to-release", "--clip", "x"], "--clip makes no sense with --to-release"),
        (["--format", "bin"], "--format needs --to-release"),
        (["--shard-gb", "1"], "--shard-gb needs --to-release"),
        (["--seg-head-init", "lisa"], "--seg-head-init needs --sam2"),
    ],
)
def test_options_of_another_direction_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--weights", "a", "--output", "b", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: x", "unknown config key 'variants'"),
        ("a: [", "sam2.yaml is no YAML"),
        ("- x", "sam2.yaml: it holds no fields"),
    ],
)
def test_a_bad_segmenter_file_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sam2.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_segmenter(tmp_path / "sam2.yaml", None)
    with pytest.raises(FileNotFoundError):
        read_segmenter(tmp_path / "absent.yaml", None)


def test_the_published_sam2_is_the_default() -> None:
    assert read_segmenter(None, "x.pt") == SegmenterConfig("sam2_hiera_l", {}, "x.pt")


def test_a_layout_that_cannot_hold_a_model_refuses_it(
    tiny_model: LoadedModel, merged_glus: Glus, tmp_path: Path
) -> None:
    for change, message in (
        (("clip", "pool", 2), "model.clip.pool=2: the released code always pools 4"),
        (("llm", "architecture", {"rope_theta": 1.0}), "architecture.rope_theta: the released layout has no such"),
    ):
        part, key, value = change
        config = copy.deepcopy(tiny_model.config)
        config.model.llm.lora_rank, config.model.trainable = 0, []
        current = getattr(getattr(config.model, part), key)
        setattr(getattr(config.model, part), key, current | value if isinstance(value, dict) else value)
        folder = tmp_path / key
        save_model(folder, merged_glus.state_dict(), config, tiny_model.vocabulary, metadata={})
        with pytest.raises(SystemExit, match=message):
            main(["--to-release", "--weights", str(folder), "--output", str(tmp_path / "back")])
