"""A checkpoint's config.json: what it says is understood, or refused with the file's name; nothing is passed over."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from glus.config import ModelConfig
from glus.models.pretrained import LoadedModel, build_glus
from glus.models.release import read_release
from glus.models.release_layout import check_llm_config, read_llm_config
from tests.conftest import tiny_segmenter
from tests.edits import edit_json
from tests.released_layout import rewrite_weights

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 400,
}
PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
PLAIN_POSITIONS = [
    {},
    {"rope_theta": 10000},
    {"rope_theta": 10000.0, "rope_scaling": None},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": PLAIN},
    {"rope_parameters": PLAIN | {"partial_rotary_factor": 1.0}},
    {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
    {"rope_parameters": None, "partial_rotary_factor": 1},
]
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
OTHER_POSITIONS = [
    {"rope_theta": 500000.0},
    {"rope_theta": float("nan")},
    {"rope_theta": float("inf")},
    {"rope_theta": "10000"},
    {"rope_theta": True},
    {"rope_theta": 10**400},
    {"rope_theta": 1000000, "rope_parameters": PLAIN},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": LLAMA_3},
    {"rope_scaling": 2.0},
    {"rope_scaling": {"type": "default", "factor": 4.0}},
    {"rope_scaling": {"type": "yarn", "short_factor": [1.0, 2.0]}},
    {"rope_parameters": PLAIN | {"rope_theta": 500000.0}},
    {"rope_parameters": PLAIN | {"rope_theta": float("nan")}},
    {"rope_parameters": {"rope_theta": 10000.0} | LLAMA_3},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {"rope_theta": 500000.0}}},
    {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": PLAIN | {"never_heard_of": 1}},
    {"rope_parameters": [PLAIN]},
    {"partial_rotary_factor": 0.25},
    {"rotary_pct": 0.25},
    {"rotary_emb_base": 500000},
    {"rope_local_base_freq": 10000.0},
    {"no_rope_layers": [1, 1, 1, 0]},
    {"use_dynamic_ntk": True},
]


def write_config(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA | fields))
    return folder / "config.json"


def our_config(**architecture: Any) -> ModelConfig:
    config = ModelConfig()
    sizes = {key: value for key, value in LLAMA.items() if key not in ("vocab_size", "rms_norm_eps")}
    config.llm.architecture = sizes | architecture
    return config


@pytest.mark.parametrize("fields", PLAIN_POSITIONS, ids=json.dumps)
def test_plain_positions_are_understood_in_any_spelling(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_config(tmp_path, **fields)
    config = read_llm_config(tmp_path)
    assert config.architecture | {"vocab_size": config.vocab_size} == LLAMA | {"num_key_value_heads": 2}
    check_llm_config(tmp_path, our_config())


@pytest.mark.parametrize("fields", OTHER_POSITIONS, ids=lambda fields: json.dumps(fields)[:60])
def test_other_positions_are_refused_in_any_spelling(tmp_path: Path, fields: dict[str, Any]) -> None:
    file = write_config(tmp_path, **fields)
    key = next(iter(fields))
    for check in (lambda: read_llm_config(tmp_path), lambda: check_llm_config(tmp_path, our_config())):
        with pytest.raises(ValueError, match=re.escape(f"{file}: {key}=")) as caught:
            check()
        assert "rope_theta=10000 without scaling is supported" in str(caught.value)


def test_positions_that_our_settings_have_too_are_taken(tmp_path: Path) -> None:
    config = our_config(rope_theta=500000)
    for fields in ({"rope_theta": 500000.0}, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}):
        write_config(tmp_path, **fields)
        check_llm_config(tmp_path, config)
    write_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: no rope_theta, but only rope_theta=500000 is supported here"):
        check_llm_config(tmp_path, config)


def test_a_published_checkpoint_without_inv_freq_is_not_converted_at_another_base(released_copy: Path) -> None:
    def drop(raw: dict[str, Any]) -> None:
        for name in [name for name in raw if name.endswith("inv_freq")]:
            del raw[name]

    rewrite_weights(released_copy, drop)
    assert read_release(released_copy, tiny_segmenter()).source
    parameters = {"rope_theta": 500000.0, "rope_type": "default"}
    edit_json(released_copy / "config.json", lambda content: content.update(rope_parameters=parameters))
    with pytest.raises(ValueError, match=r"config\.json: rope_parameters=.*500000"):
        read_release(released_copy, tiny_segmenter())


def test_training_does_not_start_from_an_llm_of_another_base(released_copy: Path, tiny_model: LoadedModel) -> None:
    edit_json(released_copy / "config.json", lambda content: content.update(rope_theta=500000.0))
    config = copy.deepcopy(tiny_model.config.model)
    for place in (released_copy, released_copy / "pytorch_model-00001-of-00002.bin"):
        config.llm.weights = str(place)
        with pytest.raises(ValueError, match=r"config\.json: rope_theta=500000\.0, but only"):
            build_glus(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0, "1", True, None, [1], 10**400], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "hidden_size", "num_attention_heads", "vocab_size"])
def test_what_is_no_size_is_refused(tmp_path: Path, key: str, value: object) -> None:
    file = write_config(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=re.escape(f"{file}: {key}={json.dumps(value)}, expected ")):
        read_llm_config(tmp_path)


def test_an_epsilon_that_our_settings_leave_to_the_default_is_compared(tmp_path: Path) -> None:
    """No shape shows it."""
    for epsilon in (1e-5, float("nan")):
        file = write_config(tmp_path, rms_norm_eps=epsilon)
        with pytest.raises(ValueError, match=re.escape(f"rms_norm_eps=1e-06, but {file} says rms_norm_eps={epsilon}")):
            check_llm_config(tmp_path, our_config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size=64, expected a multiple of num_attention_heads"),
        ({"hidden_act": "swoosh"}, "hidden_act=swoosh, expected one that transformers knows"),
        ({"model_type": "mistral"}, 'model_type="mistral", but only llama'),
        ({"model_type": None}, "model_type=null, but only llama"),
        ({"text_config": {"hidden_size": 64}}, "LLaVA as transformers writes it .* take the original layout"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights are not read"),
    ],
)
def test_another_kind_of_model_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    file = write_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        read_llm_config(tmp_path)


def test_a_byte_order_mark_is_no_damage(released_copy: Path) -> None:
    expected = read_release(released_copy, tiny_segmenter())
    files = [*released_copy.glob("*.json"), released_copy.parent / "clip" / "config.json"]
    assert len(files) == 4  # the index of the shards and the added tokens too
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = read_release(released_copy, tiny_segmenter())
    assert found.config == expected.config
    assert found.vocabulary.added_tokens == expected.vocabulary.added_tokens
