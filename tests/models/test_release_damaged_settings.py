"""A published checkpoint whose tokenizer, config.json or vision tower's settings are damaged stops with a message."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

from glus.models.release import read_release
from tests.conftest import tiny_segmenter
from tests.edits import edit_json
from tests.models.damage import Damage, check_named


def added_tokens(folder: Path) -> dict[str, int]:
    return json.loads((folder / "added_tokens.json").read_text())


def list_tokens(folder: Path, tokens: dict[int, str]) -> None:
    """As newer versions of transformers list them, beside added_tokens.json."""
    listed = {str(number): {"content": token} for number, token in tokens.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))


def test_tokens_listed_twice_alike_are_no_damage(released_copy: Path) -> None:
    added = added_tokens(released_copy)
    list_tokens(released_copy, {1: "<s>", 2: "</s>"} | {number: token for token, number in added.items()})
    assert read_release(released_copy, tiny_segmenter()).vocabulary.seg_id == added["[SEG]"]


# Each function damages a folder, choosing at random where, and returns what the message must say.


def no_tokenizer(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["tokenizer.model", "added_tokens.json"])
    (folder / name).unlink()
    return f"tokenizer folder {folder} has no {name}"


def cut_tokenizer(folder: Path, rng: random.Random) -> str:
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size // 2)])
    return f"{file} is no SentencePiece model"


def seg_twice(folder: Path, rng: random.Random) -> str:
    file = folder / "added_tokens.json"
    size = max(added_tokens(folder).values())
    file.write_text(file.read_text().rstrip("}\n ") + f', "[SEG]": {rng.randrange(size - 3, size)}}}')
    return f"{file} is no JSON: key '[SEG]' stands twice"


def seg_id_taken(folder: Path, rng: random.Random) -> str:
    file = folder / "added_tokens.json"
    other = rng.choice(["<im_start>", "<im_end>", "<im_patch>"])
    edit_json(file, lambda added: added.update({"[SEG]": added[other]}))
    return f"{file} must give each token one id of its own"


def no_seg(folder: Path, rng: random.Random) -> str:
    file = folder / "added_tokens.json"
    other = rng.choice(["[seg]", "SEG", " [SEG]"])
    edit_json(file, lambda added: added.update({other: added.pop("[SEG]")}))
    return f"{file} lacks ['[SEG]']"


def seg_also_a_piece(folder: Path, rng: random.Random) -> str:
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


def seg_listed_with_another_id(folder: Path, rng: random.Random) -> str:
    listed = {number: token for token, number in added_tokens(folder).items() if token != "[SEG]"}
    other = added_tokens(folder)["[SEG]"] - 1 - rng.randrange(2)
    list_tokens(folder, listed | {other: "[SEG]"})
    return f"{folder}/tokenizer_config.json gives [SEG] the id {other}, but"


def seg_id_listed_for_another(folder: Path, rng: random.Random) -> str:
    number, token = added_tokens(folder)["[SEG]"], rng.choice(["[LOC]", "<pad>"])
    list_tokens(folder, {number: token})
    return f"{folder}/tokenizer_config.json gives {token} the id {number}, but"


def id_without_row(folder: Path, rng: random.Random) -> str:
    number = json.loads((folder / "config.json").read_text())["vocab_size"] + rng.randrange(3)
    edit_json(folder / "added_tokens.json", lambda content: content.update({"[SEG]": number}))
    return f"{folder}/added_tokens.json has id {number}, but config.json says vocab_size="


def other_vocabulary(folder: Path, rng: random.Random) -> str:
    edit_json(folder / "config.json", lambda content: content.update(vocab_size=5000 + rng.randrange(9)))
    return "wrong shape: lm_head.weight is ("


def no_config(folder: Path, rng: random.Random) -> str:
    (folder / "config.json").unlink()
    return f"{folder} has no config.json"


def cut_config(folder: Path, rng: random.Random) -> str:
    file = folder / "config.json"
    file.write_text(file.read_text()[: rng.randrange(1, 100)])
    return f"{file} is no JSON"


def no_field(folder: Path, rng: random.Random) -> str:
    file = folder / "config.json"
    key = rng.choice(
        ["hidden_size", "vocab_size", "rms_norm_eps", "hidden_act", "vision_tower", "mm_vision_select_layer"]
    )
    edit_json(file, lambda content: content.pop(key))
    return f"{file}: {key}=null, expected"


def other_model(folder: Path, rng: random.Random) -> str:
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
    edit_json(file, lambda content: content.update({key: value}))
    return f"{file}: {key}={json.dumps(value)}, but only"


def odd_listed_token(folder: Path, rng: random.Random) -> str:
    listed = rng.choice([[], {"0": {}}, {"0": 1}])
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return f"{folder}/tokenizer_config.json"


def clip_epsilon(folder: Path, rng: random.Random) -> str:
    file = folder.parent / "clip" / "config.json"
    edit_json(file, lambda content: content.update(layer_norm_eps=rng.choice([float("nan"), "1e-5", 0])))
    return f"{file}: layer_norm_eps="


def no_clip_size(folder: Path, rng: random.Random) -> str:
    file = folder.parent / "clip" / "config.json"
    edit_json(file, lambda content: content.update(patch_size=str(rng.randrange(99))))
    return f"{file}: patch_size="


DAMAGES = [
    no_tokenizer,
    cut_tokenizer,
    seg_twice,
    seg_id_taken,
    no_seg,
    seg_also_a_piece,
    seg_listed_with_another_id,
    seg_id_listed_for_another,
    id_without_row,
    other_vocabulary,
    no_config,
    cut_config,
    no_field,
    other_model,
    odd_listed_token,
    clip_epsilon,
    no_clip_size,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_stops_with_a_message_that_names_it(released_copy: Path, damage: Damage) -> None:
    check_named(damage, released_copy)
