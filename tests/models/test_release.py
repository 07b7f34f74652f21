"""Published checkpoints: what is read from them, what it computes, and that any damage stops with its name."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from glus.config import FuserGamma, ModelConfig, Precision, SegHeadInit, SegmenterConfig
from glus.models.build import LoadedModel, build_glus, load_parts, trainable_names
from glus.models.glus import Glus
from glus.models.language import merge_lora
from glus.models.release import build_release, load_lisa, load_release, read_release, to_release
from glus.models.weights import MisfitError, read_tensors
from glus.structures import Batch
from tests.conftest import SAM2_OVERRIDES
from tests.released_layout import SAM1_NAMES, glus_tensors, lisa_tensors, write_checkpoint, write_clip, write_weights

BatchMaker = Callable[..., Batch]
INDEX = "pytorch_model.bin.index.json"
DROPPED = "dropped: 2 rotary frequencies (inv_freq), computed here"


def _segmenter(**settings: Any) -> SegmenterConfig:
    return SegmenterConfig("sam2_hiera_t", SAM2_OVERRIDES, multimask_fallback=False, **settings)


@pytest.fixture(scope="module")
def model(merged_glus: Glus) -> Glus:
    return merged_glus


@pytest.fixture(scope="module")
def released(model: Glus, tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged GLUS checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    return write_checkpoint(folder, glus_tensors(model), model, tiny_model.vocabulary)


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage, its CLIP beside it."""
    shutil.copytree(released.parent, tmp_path / "copy")
    return tmp_path / "copy" / "checkpoint"


def _outputs(glus: Glus, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        output = glus(batch)
    return [output.seg_logits_NQV, output.seg_embeds_NQC, output.mask_logits_NQmm]


def _assert_same_state(a: Glus, b: Glus) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors", "safetensors shards"])
def test_a_checkpoint_of_any_form_is_the_same_model(
    model: Glus, tiny_model: LoadedModel, make_batch: BatchMaker, tmp_path: Path, form: str
) -> None:
    raw = glus_tensors(model)
    write_checkpoint(tmp_path / "checkpoint", raw, model, tiny_model.vocabulary, form)
    loaded, reports = build_release(read_release(tmp_path / "checkpoint", _segmenter()))
    report = reports["checkpoint"]
    assert (report.matched, report.missing, report.unexpected, report.wrong_shape) == (len(raw) - 2, (), (), ())
    assert list(report.dropped.values()) == [2]
    assert reports["CLIP"].matched == len(model.clip.vision_model.state_dict())
    _assert_same_state(loaded.glus, model)
    assert not loaded.glus.training
    batch = make_batch((2, 1))
    assert all(torch.equal(a, b) for a, b in zip(_outputs(loaded.glus, batch), _outputs(model, batch), strict=True))


def test_sizes_tokens_and_settings_are_the_checkpoints(released: Path, tiny_model: LoadedModel) -> None:
    loaded = load_release(released, _segmenter())
    config, expected = loaded.config.model, tiny_model.config.model
    assert expected.llm.architecture.items() <= config.llm.architecture.items()
    assert expected.clip.architecture.items() - {("projection_dim", 32)} <= config.clip.architecture.items()
    assert (config.llm.vocab_size, config.llm.lora_rank) == (expected.llm.vocab_size, 0)
    assert (config.clip.select_layer, config.clip.pool) == (-2, 4)
    assert config.precision is Precision.fp32
    assert "lora" not in config.trainable
    assert loaded.vocabulary.folder == released
    assert loaded.vocabulary.seg_id == tiny_model.vocabulary.seg_id
    frames, inference = loaded.config.frames, loaded.config.inference
    assert (frames.num_context, frames.num_query, inference.memory_stride) == (4, 4, 3)


def test_other_values_of_config_json_are_taken_over(folder: Path) -> None:
    _change_json(folder / "config.json", mm_vision_select_layer=-1, rms_norm_eps=1e-5, num_key_value_heads=None)
    with pytest.raises(ValueError, match="num_key_value_heads=null, expected int"):
        load_release(folder, _segmenter())
    content = json.loads((folder / "config.json").read_text())
    del content["num_key_value_heads"]  # older checkpoints: as many as heads
    (folder / "config.json").write_text(json.dumps(content))
    loaded = load_release(folder, _segmenter())
    assert loaded.glus.clip.select_layer == -1
    assert loaded.glus.language.llama.model.norm.variance_epsilon == 1e-5
    assert loaded.glus.language.llama.config.num_key_value_heads == 2


def test_a_checkpoint_in_bfloat16_is_computed_in_it(folder: Path, model: Glus) -> None:
    for file in folder.glob("*.bin"):
        torch.save({name: value.bfloat16() for name, value in read_tensors(file).items()}, file)
    loaded = load_release(folder, _segmenter())
    assert loaded.config.model.precision is Precision.bf16
    assert torch.equal(loaded.glus.projector.weight, model.projector.weight.bfloat16())


def test_identity_gamma_holds_over_the_checkpoints(released: Path) -> None:
    for gamma, share in ((FuserGamma.identity, 1.0), (FuserGamma.checkpoint, 0.0)):
        fuser = load_release(released, _segmenter(fuser_gamma=gamma)).glus.segmenter.sam.memory_encoder.fuser
        assert all(float((layer.gamma == 1e-6).float().mean()) == share for layer in fuser.layers)


def test_adapters_can_be_put_on_top(released: Path, model: Glus, make_batch: BatchMaker) -> None:
    checkpoint = read_release(released, _segmenter())
    checkpoint.config.llm.lora_rank = 2
    checkpoint.config.trainable = ["lora"]
    loaded, reports = build_release(checkpoint)
    assert reports["checkpoint"].is_clean
    assert len(trainable_names(loaded.glus)) == 2 * 2 * 2  # A and B of q and v in both layers
    batch = make_batch((1,))
    assert all(torch.equal(a, b) for a, b in zip(_outputs(loaded.glus, batch), _outputs(model, batch), strict=True))


def test_damage_is_found_below_adapters_too(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight", None))
    checkpoint = read_release(folder, _segmenter())
    checkpoint.config.llm.lora_rank = 2
    with pytest.raises(MisfitError, match=r"1 missing.*: model\.layers\.0\.self_attn\.q_proj\.weight$"):
        build_release(checkpoint)


# Where the vision tower is.


def test_tokens_listed_twice_alike_are_no_damage(folder: Path) -> None:
    """As newer versions of transformers list them, base tokens too."""
    added = json.loads((folder / "added_tokens.json").read_text()) | {"<s>": 1, "</s>": 2}
    listed = {str(number): {"content": token} for token, number in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    assert read_release(folder, _segmenter()).vocabulary.seg_id == added["[SEG]"]


def test_llavas_name_of_the_vision_tower_will_do(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vision_tower"', '"mm_vision_tower"'))
    assert read_release(folder, _segmenter()).config.clip.weights == str(folder.parent / "clip")


@pytest.mark.parametrize("where", ["beside", "inside", "absolute"])
def test_the_named_clip_is_found(folder: Path, tmp_path: Path, where: str) -> None:
    target = {"beside": folder.parent / "tower", "inside": folder / "tower", "absolute": tmp_path / "tower"}[where]
    (folder.parent / "clip").rename(target)
    _change_json(folder / "config.json", vision_tower=str(target) if where == "absolute" else "tower")
    assert read_release(folder, _segmenter()).config.clip.weights == str(target)


def test_a_whole_clip_keeps_its_vision_sizes_apart(folder: Path) -> None:
    file = folder.parent / "clip" / "config.json"
    file.write_text(json.dumps({"projection_dim": 7, "vision_config": json.loads(file.read_text())}))
    assert load_release(folder, _segmenter()).config.model.clip.architecture["hidden_size"] == 32


def test_another_clip_can_be_given(folder: Path, tmp_path: Path, model: Glus) -> None:
    _change_json(folder / "config.json", vision_tower="/where/the/authors/had/it")
    with pytest.raises(FileNotFoundError, match=r"config\.json: vision_tower=/where/the/authors.*--clip"):
        load_release(folder, _segmenter())
    write_clip(tmp_path / "mine", model)
    assert load_release(folder, _segmenter(), clip=str(tmp_path / "mine")).glus.clip.width == 32
    with pytest.raises(FileNotFoundError, match=r"clip=.*absent: no such folder"):
        load_release(folder, _segmenter(), clip=str(tmp_path / "absent"))


# Hugging Face.


def test_a_hub_id_is_downloaded_without_code(
    released: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Glus
) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str({"authors/GLUS-A": released, "openai/clip-vit-large-patch14": tmp_path / "clip"}[repository])

    write_clip(tmp_path / "clip", model)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = load_release("authors/GLUS-A", _segmenter(), clip="openai/clip-vit-large-patch14")
    _assert_same_state(loaded.glus, model)
    assert [repository for repository, _ in asked] == ["authors/GLUS-A", "openai/clip-vit-large-patch14"]
    assert all(not pattern.endswith((".py", "*")) for _, patterns in asked for pattern in patterns)


def test_a_vision_tower_may_be_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _change_json(folder / "config.json", vision_tower="openai/clip-vit-large-patch14")
    tower = folder.parent / "clip"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: str(tower))
    assert read_release(folder, _segmenter()).config.clip.weights == str(tower)


def test_a_failed_download_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"weights=nobody/nothing: no such folder, and its download.*no network"
    ):
        load_release("nobody/nothing", _segmenter())


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("weights/GLUS-A", "/weights/GLUS-A", "GLUS-A", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"weights={name}: no such folder"):
            load_release(name, _segmenter())


# Damage. Each function damages a folder, choosing at random where, and returns what the message must name.


def _change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], index: bool = True) -> None:
    """Apply ``change`` to the tensors of each shard, and keep the index true unless ``index`` is False."""
    weight_map = {}
    for file in sorted(folder.glob("pytorch_model-*.bin")):
        tensors = read_tensors(file)
        change(tensors)
        torch.save(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
    if index:
        _change_json(folder / INDEX, weight_map=weight_map)


def _any_name(folder: Path, rng: random.Random, wanted: Callable[[str, torch.Tensor], bool]) -> str:
    return rng.choice(sorted(name for name, value in read_tensors(folder).items() if wanted(name, value)))


def _is_weight(name: str, value: torch.Tensor) -> bool:
    return not name.endswith("inv_freq") and value.numel() > 1


def _change_one(
    folder: Path, rng: random.Random, change: Callable[[torch.Tensor], torch.Tensor], wanted: Any = _is_weight
) -> str:
    name = _any_name(folder, rng, wanted)
    _rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name])} if name in tensors else {}))
    return name


def _drop(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng, _is_weight)
    _rewrite(folder, lambda tensors: tensors.pop(name, None))
    return f"1 missing, 0 unexpected, 0 wrong shape; {DROPPED}; missing: {name}"


def _drop_but_list(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng, _is_weight)
    _rewrite(folder, lambda tensors: tensors.pop(name, None), index=False)
    return f"contradict each other: listed but not in the file ['{name}'] (1)"


def _drop_frequencies(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng, lambda name, _: name.endswith("inv_freq"))
    _rewrite(folder, lambda tensors: tensors.pop(name, None))
    return f"inv_freq of 1 layers, expected 2; see {name}"


def _other_frequencies(folder: Path, rng: random.Random) -> str:
    frequencies = lambda name, _: name.endswith("inv_freq")  # noqa: E731
    name = _change_one(folder, rng, lambda value: value**1.1, frequencies)
    return f"{name} holds other rotary frequencies"


def _integer_frequencies(folder: Path, rng: random.Random) -> str:
    name = _change_one(folder, rng, lambda value: value.int(), lambda name, _: name.endswith("inv_freq"))
    return f"{name} is (16,) int32, expected (16,), floating point"


def _rename(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng, _is_weight)
    new = rng.choice([name + "s", name.replace(".", "_", 1), "module." + name, name.upper()])
    _rewrite(folder, lambda tensors: tensors.update({new: tensors.pop(name)} if name in tensors else {}))
    return f"missing: {name}; unexpected: {new}"


def _rename_to_ours(folder: Path, rng: random.Random) -> str:
    """Our own names are not the checkpoint's: a tensor under one is unexpected."""
    old, new = rng.choice(
        [
            ("model.mm_projector.weight", "projector.weight"),
            ("model.text_hidden_fcs.0.2.bias", "seg_head.fc2.bias"),
            ("lm_head.weight", "language.llama.lm_head.weight"),
            ("model.visual_model.no_mem_embed", "segmenter.sam.no_mem_embed"),
        ]
    )
    _rewrite(folder, lambda tensors: tensors.update({new: tensors.pop(old)} if old in tensors else {}))
    return f"missing: {old}; unexpected: {new}"


def _swap_prefix(folder: Path, rng: random.Random) -> str:
    name = _any_name(folder, rng, lambda name, _: name.startswith("model.visual_model."))
    new = name.replace("visual_model", "vision_model")
    _rewrite(folder, lambda tensors: tensors.update({new: tensors.pop(name)} if name in tensors else {}))
    return f"missing: {name}; unexpected: {new}"


def _transpose(folder: Path, rng: random.Random) -> str:
    not_square = lambda name, value: value.ndim == 2 and value.shape[0] != value.shape[1]  # noqa: E731
    name = _any_name(folder, rng, not_square)
    rows, columns = read_tensors(folder)[name].shape
    _rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()} if name in tensors else {}))
    return f"1 wrong shape; {DROPPED}; wrong shape: {name} is ({columns}, {rows}), expected ({rows}, {columns})"


def _cut_rows(folder: Path, rng: random.Random) -> str:
    several = lambda name, value: _is_weight(name, value) and value.shape[0] > 1  # noqa: E731
    return f"wrong shape: {_change_one(folder, rng, lambda value: value[:-1].clone(), several)} is ("


def _extra_dimension(folder: Path, rng: random.Random) -> str:
    """Which copying would have broadcast."""
    return f"wrong shape: {_change_one(folder, rng, lambda value: value[None].clone())} is (1,"


def _integers(folder: Path, rng: random.Random) -> str:
    dtype = rng.choice([torch.int8, torch.int64, torch.uint8, torch.bool])
    name = _change_one(folder, rng, lambda value: value.to(dtype))
    return f"bad values: {name} is {str(dtype).removeprefix('torch.')}, expected floating point"


def _not_a_number(folder: Path, rng: random.Random) -> str:
    def poison(value: torch.Tensor) -> torch.Tensor:
        value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf")])
        return value

    return f"bad values: {_change_one(folder, rng, poison)} holds 1 values that are NaN or infinite"


def _extra(folder: Path, rng: random.Random) -> str:
    name = f"model.layers.{rng.randrange(2)}.self_attn.q_proj.bias"
    file = sorted(folder.glob("pytorch_model-*.bin"))[0].name
    _rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(64)} if "lm_head.weight" in tensors else {}))
    assert file in (folder / INDEX).read_text()
    return f"1 unexpected, 0 wrong shape; {DROPPED}; unexpected: {name}"


def _twice(folder: Path, rng: random.Random) -> str:
    """Without an index nothing says which of two copies counts."""
    (folder / INDEX).unlink()
    first, second = sorted(folder.glob("pytorch_model-*.bin"))
    name = rng.choice(sorted(read_tensors(first)))
    torch.save(read_tensors(second) | {name: torch.zeros(1)}, second)
    return f"{second} repeats tensors of another file in {folder}: {name}"


def _cut_shard(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.glob("pytorch_model-*.bin")))
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return f"weights {file} do not decode"


def _no_shard(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.glob("pytorch_model-*.bin")))
    file.unlink()
    return f"{folder / INDEX} names the shard '{file.name}', which is not in {folder}"


def _no_shard_no_index(folder: Path, rng: random.Random) -> str:
    (folder / INDEX).unlink()
    number = rng.choice((1, 2))
    (folder / f"pytorch_model-0000{number}-of-00002.bin").unlink()
    return f"{folder} lacks shards [{number}] of 2"


def _bad_index(folder: Path, rng: random.Random) -> str:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(rng.choice([text[: rng.randrange(len(text))], "[]", "{}"]))
    return f"{folder / INDEX} is no index"


def _outside_shard(folder: Path, rng: random.Random) -> str:
    """An index does not reach out of its folder."""
    file = rng.choice(sorted(folder.glob("pytorch_model-*.bin")))
    file.rename(folder.parent / file.name)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(file.name, f"../{file.name}"))
    return f"names the shard '../{file.name}', which is not in {folder}"


def _code(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.glob("pytorch_model-*.bin")))
    torch.save(read_tensors(file) | {"run": Path("code in a pickle")}, file)
    return f"weights {file} do not decode"


def _no_tokenizer(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["tokenizer.model", "added_tokens.json"])
    (folder / name).unlink()
    return f"tokenizer folder {folder} has no {name}"


def _cut_tokenizer(folder: Path, rng: random.Random) -> str:
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size // 2)])
    return f"{file} is no SentencePiece model"


def _seg_twice(folder: Path, rng: random.Random) -> str:
    file = folder / "added_tokens.json"
    size = max(json.loads(file.read_text()).values())
    file.write_text(file.read_text().rstrip("}\n ") + f', "[SEG]": {rng.randrange(size - 3, size)}}}')
    return f"{file} gives ['[SEG]'] more than once"


def _seg_id_taken(folder: Path, rng: random.Random) -> str:
    file = folder / "added_tokens.json"
    added = json.loads(file.read_text())
    _change_json(file, **{"[SEG]": added[rng.choice(["<im_start>", "<im_end>", "<im_patch>"])]})
    return f"{file} must give each token one id of its own"


def _no_seg(folder: Path, rng: random.Random) -> str:
    file = folder / "added_tokens.json"
    added = json.loads(file.read_text())
    added[rng.choice(["[seg]", "SEG", " [SEG]"])] = added.pop("[SEG]")
    file.write_text(json.dumps(added))
    return f"{file} lacks ['[SEG]']"


def _seg_also_a_piece(folder: Path, rng: random.Random) -> str:
    """The same text would be two ids: one of the SentencePiece model, one added."""
    prefix = str(folder / "other")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the red circle", "a blue square"]),
        model_prefix=prefix,
        model_type="bpe",
        vocab_size=30 + rng.randrange(3),
        user_defined_symbols=["[SEG]"],
        minloglevel=2,
    )
    shutil.move(prefix + ".model", folder / "tokenizer.model")
    return f"{folder}/tokenizer.model already holds ['[SEG]']"


def _seg_listed_with_another_id(folder: Path, rng: random.Random) -> str:
    added = json.loads((folder / "added_tokens.json").read_text())
    other = added["[SEG]"] - 1 - rng.randrange(2)
    listed = {str(number): {"content": token} for token, number in added.items() if number != other}
    del listed[str(added["[SEG]"])]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": listed | {str(other): {"content": "[SEG]"}}})
    )
    return f"{folder}/tokenizer_config.json gives [SEG] the id {other}, but"


def _seg_id_listed_for_another(folder: Path, rng: random.Random) -> str:
    number, token = json.loads((folder / "added_tokens.json").read_text())["[SEG]"], rng.choice(["[LOC]", "<pad>"])
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(number): {"content": token}}})
    )
    return f"{folder}/tokenizer_config.json gives {token} the id {number}, but"


def _id_without_row(folder: Path, rng: random.Random) -> str:
    number = json.loads((folder / "config.json").read_text())["vocab_size"] + rng.randrange(3)
    _change_json(folder / "added_tokens.json", **{"[SEG]": number})
    return f"{folder}/added_tokens.json has id {number}, but config.json says vocab_size="


def _other_vocabulary(folder: Path, rng: random.Random) -> str:
    _change_json(folder / "config.json", vocab_size=5000 + rng.randrange(9))
    return "wrong shape: lm_head.weight is ("


def _no_config(folder: Path, rng: random.Random) -> str:
    (folder / "config.json").unlink()
    return f"{folder} has no config.json"


def _cut_config(folder: Path, rng: random.Random) -> str:
    file = folder / "config.json"
    file.write_text(file.read_text()[: rng.randrange(1, 100)])
    return f"{file} is no JSON"


def _no_field(folder: Path, rng: random.Random) -> str:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    key = rng.choice(
        ["hidden_size", "vocab_size", "rms_norm_eps", "hidden_act", "vision_tower", "mm_vision_select_layer"]
    )
    del content[key]
    file.write_text(json.dumps(content))
    return f"{file}: {key}=null, expected"


def _other_model(folder: Path, rng: random.Random) -> str:
    file = folder / "config.json"
    key, value = rng.choice(
        [
            ("tie_word_embeddings", True),
            ("rope_scaling", {"type": "linear", "factor": 2.0}),
            ("rope_theta", 500000.0),
            ("mm_vision_select_feature", "cls_patch"),
            ("mm_use_im_start_end", False),
        ]
    )
    _change_json(file, **{key: value})
    return f"{file}: {key}={json.dumps(value)}, but only"


def _clip_tensor(folder: Path, rng: random.Random) -> str:
    file = folder.parent / "clip" / "pytorch_model.bin"
    tensors = read_tensors(file)
    name = rng.choice(sorted(tensors))
    del tensors[name]
    torch.save(tensors, file)
    counts = f"{len(tensors)} matched, 1 missing, 0 unexpected, 0 wrong shape"
    return f"weights of {file.parent} do not fit: {counts}; missing: clip.{name}"


def _no_clip_size(folder: Path, rng: random.Random) -> str:
    file = folder.parent / "clip" / "config.json"
    _change_json(file, patch_size=str(rng.randrange(99)))
    return f"{file}: patch_size="


DAMAGES = [
    _drop,
    _drop_but_list,
    _drop_frequencies,
    _other_frequencies,
    _integer_frequencies,
    _rename,
    _rename_to_ours,
    _swap_prefix,
    _transpose,
    _cut_rows,
    _extra_dimension,
    _integers,
    _not_a_number,
    _extra,
    _twice,
    _cut_shard,
    _no_shard,
    _no_shard_no_index,
    _bad_index,
    _outside_shard,
    _code,
    _no_tokenizer,
    _cut_tokenizer,
    _seg_twice,
    _seg_id_taken,
    _no_seg,
    _seg_also_a_piece,
    _seg_listed_with_another_id,
    _seg_id_listed_for_another,
    _id_without_row,
    _other_vocabulary,
    _no_config,
    _cut_config,
    _no_field,
    _other_model,
    _clip_tensor,
    _no_clip_size,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_stops_with_a_message_that_names_it(folder: Path, damage: Callable[[Path, random.Random], str]) -> None:
    culprit = damage(folder, random.Random(damage.__name__))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(culprit)):
        load_release(folder, _segmenter())


def test_another_sam2_than_the_checkpoints_is_refused(released: Path) -> None:
    with pytest.raises(MisfitError, match=r"missing: model\.visual_model\.image_encoder.*wrong shape: model\.visual"):
        load_release(
            released, SegmenterConfig("sam2_hiera_s", SAM2_OVERRIDES | {"image_encoder.trunk.stages": [1, 2, 2, 1]})
        )


# The way back.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_gives_every_bit(released: Path, dtype: torch.dtype, folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    raw, loaded = read_tensors(folder), load_release(folder, _segmenter())
    back = to_release(loaded.glus.state_dict(), loaded.config.model)
    assert back.keys() == raw.keys()
    exact = torch.float32 if dtype is torch.float16 else dtype  # our precisions; float32 holds float16 exactly
    for name, value in raw.items():
        assert back[name].dtype is exact, name
        if name.endswith("inv_freq") and dtype is torch.float16:
            torch.testing.assert_close(back[name].half(), value, rtol=0, atol=0)
        else:
            assert torch.equal(back[name], value.to(exact)), name


def test_adapters_and_strangers_have_no_place_in_the_released_layout(tiny_model: LoadedModel, model: Glus) -> None:
    config = tiny_model.config.model
    with pytest.raises(ValueError, match=r"tensors have no place .*base_layer.*LoRA adapters must be merged first"):
        to_release(tiny_model.glus.state_dict(), config)
    with pytest.raises(ValueError, match="1 tensors have no place in the released layout, such as score_head"):
        to_release(model.state_dict() | {"score_head.weight": torch.zeros(1)}, config)


# Training from LISA.


@pytest.fixture(scope="module")
def lisa(model: Glus, tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LISA's layout; SAM2 in a file beside it."""
    folder = tmp_path_factory.mktemp("lisa") / "LISA-7B-v1"
    write_checkpoint(folder, lisa_tensors(model), model, tiny_model.vocabulary)
    torch.save({"model": model.segmenter.sam.state_dict()}, folder.parent / "sam2.pt")
    return folder


def _start(tiny_model: LoadedModel, lisa: Path, init: SegHeadInit = SegHeadInit.random) -> ModelConfig:
    config = copy.deepcopy(tiny_model.config.model)
    config.llm.weights = str(lisa)
    config.segmenter.weights = str(lisa.parent / "sam2.pt")
    config.clip.weights = str(lisa.parent / "clip")
    config.seg_head_init = init
    return config


@pytest.mark.parametrize("init", list(SegHeadInit))
def test_training_starts_from_lisa_and_sam2(
    tiny_model: LoadedModel, model: Glus, lisa: Path, init: SegHeadInit
) -> None:
    config = _start(tiny_model, lisa, init)
    torch.manual_seed(11)
    untouched = build_glus(config, load_weights=False).seg_head.state_dict()
    torch.manual_seed(11)
    glus = build_glus(config)
    assert any(".lora_" in name for name in trainable_names(glus))
    merge_lora(glus.language.llama)
    expected = model.state_dict()
    for name, value in glus.state_dict().items():
        if name.startswith("seg_head.") and init is SegHeadInit.random:
            assert torch.equal(value, untouched[name.removeprefix("seg_head.")]), name
            assert not torch.equal(value, expected[name]), name
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("init", list(SegHeadInit))
def test_what_is_not_taken_of_lisa_is_counted(
    tiny_model: LoadedModel, model: Glus, lisa: Path, init: SegHeadInit
) -> None:
    config = _without_lora(_start(tiny_model, lisa, init))
    reports = load_parts(build_glus(config, load_weights=False), config)
    report = reports["model.llm.weights"]
    head = {"LISA's [SEG] head (model.seg_head_init=random)": 4} if init is SegHeadInit.random else {}
    frequencies = {"rotary frequencies (inv_freq), computed here": 2}
    assert report.dropped == frequencies | {"LISA's SAM-1": len(SAM1_NAMES)} | head
    language = len(model.language.llama.state_dict()) + 2  # and the projector
    assert report.matched == language + (4 if init is SegHeadInit.lisa else 0)
    assert reports["model.segmenter.weights"].matched == len(model.segmenter.sam.state_dict())
    assert reports["model.clip.weights"].matched == len(model.clip.vision_model.state_dict())


def _without_lora(config: ModelConfig) -> ModelConfig:
    config.llm.lora_rank = 0
    config.trainable = []
    return config


def test_lisa_and_sam2_make_one_model(lisa: Path, model: Glus) -> None:
    segmenter = _segmenter(weights=str(lisa.parent / "sam2.pt"), fuser_gamma=FuserGamma.identity)
    loaded, reports = load_lisa(lisa, segmenter, seg_head_init=SegHeadInit.lisa)
    assert all(report.is_clean for report in reports.values())
    fuser = "segmenter.sam.memory_encoder.fuser.layers."
    for name, value in model.state_dict().items():
        if name.startswith(fuser) and name.endswith("gamma"):
            value = torch.full_like(value, 1e-6)
        assert torch.equal(loaded.glus.state_dict()[name], value), name


def _take_away(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(raw: dict[str, torch.Tensor]) -> None:
        for name in names:
            del raw[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_take_away("model.mm_projector.bias"), "1 missing.*missing: model.mm_projector.bias"),
        (_take_away("model.norm.weight"), "1 missing.*missing: model.norm.weight"),
        (_take_away("model.text_hidden_fcs.0.2.bias"), "1 missing.*missing: model.text_hidden_fcs.0.2.bias"),
        (lambda raw: raw.update(extra=torch.zeros(1)), "1 unexpected.*unexpected: extra"),
        (
            lambda raw: raw.update({"model.visual_model.image_encoder.neck.convs.0.conv.bias": torch.zeros(1)}),
            r"unexpected: model\.visual_model\.image_encoder\.neck\.convs.*\(it holds SAM2, as a merged GLUS does",
        ),
        (lambda raw: raw.update({"model.norm.weight": torch.zeros(1)}), r"model.norm.weight is \(1,\)"),
        (
            _take_away("model.layers.1.self_attn.rotary_emb.inv_freq"),
            r"inv_freq of 1 layers, expected 2; see model\.layers\.1",
        ),
    ],
)
def test_damaged_lisa_stops_with_a_message(
    tiny_model: LoadedModel, model: Glus, lisa: Path, tmp_path: Path, change: Any, message: str
) -> None:
    raw = lisa_tensors(model)
    change(raw)
    write_weights(tmp_path, raw, "bin shards")
    config = _start(tiny_model, lisa, SegHeadInit.lisa)
    config.llm.weights = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_glus(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", 1e-5, r"rms_norm_eps=1e-06, but .*config\.json says rms_norm_eps=1e-05: set .*=1e-05"),
        ("hidden_size", 65, "model.llm.architecture.hidden_size=64, but"),
        ("mm_vision_select_layer", -1, "model.clip.select_layer=-2, but .*says mm_vision_select_layer=-1"),
    ],
)
def test_settings_that_contradict_lisas_config_are_refused(
    tiny_model: LoadedModel, lisa: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    shutil.copytree(lisa.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / lisa.name
    _change_json(folder / "config.json", **{key: value})
    config = _start(tiny_model, folder)
    config.llm.architecture["rms_norm_eps"] = 1e-6
    with pytest.raises(ValueError, match=message):
        build_glus(config)


def test_a_lisa_head_needs_lisa(tiny_model: LoadedModel) -> None:
    config = copy.deepcopy(tiny_model.config.model)
    config.seg_head_init = SegHeadInit.lisa
    with pytest.raises(ValueError, match=r"model\.seg_head_init=lisa: set model\.llm\.weights"):
        build_glus(config)


def test_lisa_is_no_merged_glus(lisa: Path) -> None:
    with pytest.raises(MisfitError, match=r"unexpected: model\.visual_model\..*\(it holds SAM-1, as LISA-7B-v1 does"):
        load_release(lisa, _segmenter())


def test_a_bare_llama_and_one_with_a_projector_start_too(
    tiny_model: LoadedModel, model: Glus, lisa: Path, tmp_path: Path
) -> None:
    """What the small model starts from: no [SEG] head, no rotary frequencies, perhaps no projector."""
    for with_projector in (False, True):
        raw = {
            name: value
            for name, value in lisa_tensors(model).items()
            if name.startswith(("model.layers", "model.norm", "model.embed", "lm_head")) and "inv_freq" not in name
        }
        projector = {"model.mm_projector.weight": model.projector.weight.detach().clone()}
        projector["model.mm_projector.bias"] = model.projector.bias.detach().clone()
        folder = tmp_path / str(with_projector)
        folder.mkdir()
        write_weights(folder, raw | (projector if with_projector else {}), "safetensors")
        config = _start(tiny_model, lisa)
        config.llm.weights = str(folder)
        glus = build_glus(config)
        assert torch.equal(glus.language.llama.lm_head.weight, model.language.llama.lm_head.weight)
        assert torch.equal(glus.projector.weight, model.projector.weight) is with_projector
