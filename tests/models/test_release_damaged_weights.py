"""A published checkpoint whose weights are damaged stops with a message that names what and where."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glus.models.weights import read_tensors
from tests.models.damage import Damage, check_named
from tests.released_layout import INDEX, read_copies, rewrite_weights

DROPPED = "dropped: 2 rotary frequencies (inv_freq), computed here"
Condition = Callable[[str, torch.Tensor], bool]


# What is changed.


def is_weight(name: str, value: torch.Tensor) -> bool:
    return not name.endswith("inv_freq") and value.numel() > 1


def is_frequency(name: str, value: torch.Tensor) -> bool:
    return name.endswith("inv_freq")


def any_name(folder: Path, rng: random.Random, wanted: Condition = is_weight) -> str:
    return rng.choice(sorted(name for name, value in read_tensors(folder).items() if wanted(name, value)))


def change_one(
    folder: Path, rng: random.Random, change: Callable[[torch.Tensor], torch.Tensor], wanted: Condition = is_weight
) -> str:
    """Change a tensor; its name."""
    name = any_name(folder, rng, wanted)
    rewrite_weights(folder, lambda raw: raw.update({name: change(raw[name])} if name in raw else {}))
    return name


def remove_one(folder: Path, rng: random.Random, wanted: Condition = is_weight) -> str:
    """Remove a tensor; its name."""
    name = any_name(folder, rng, wanted)
    rewrite_weights(folder, lambda raw: raw.pop(name, None))
    return name


def rename_one(folder: Path, old: str, new: str) -> str:
    """Rename a tensor; what the message must say."""
    rewrite_weights(folder, lambda raw: raw.update({new: raw.pop(old)} if old in raw else {}))
    return f"missing: {old}; unexpected: {new}"


def any_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("pytorch_model-*.bin")))


# Each function damages a folder, choosing at random where, and returns what the message must say.


def drop(folder: Path, rng: random.Random) -> str:
    name = remove_one(folder, rng)
    return f"1 missing, 0 unexpected, 0 wrong shape; {DROPPED}; missing: {name}"


def drop_but_list(folder: Path, rng: random.Random) -> str:
    index = (folder / INDEX).read_text()
    name = remove_one(folder, rng)
    (folder / INDEX).write_text(index)
    return f"contradict each other: listed but not in the file ['{name}'] (1)"


def drop_frequencies(folder: Path, rng: random.Random) -> str:
    return f"inv_freq of 1 layers, expected 2; see {remove_one(folder, rng, is_frequency)}"


def other_frequencies(folder: Path, rng: random.Random) -> str:
    name = change_one(folder, rng, lambda value: value**1.1, is_frequency)
    return f"{name} holds other rotary frequencies"


def integer_frequencies(folder: Path, rng: random.Random) -> str:
    name = change_one(folder, rng, lambda value: value.int(), is_frequency)
    return f"{name} holds other rotary frequencies"


def rename(folder: Path, rng: random.Random) -> str:
    old = any_name(folder, rng)
    new = rng.choice([old + "s", old.replace(".", "_", 1), "module." + old, old.upper()])
    return rename_one(folder, old, new)


def rename_to_ours(folder: Path, rng: random.Random) -> str:
    """Our own names are not the checkpoint's: a tensor under one is unexpected."""
    names = {
        "model.mm_projector.weight": "mllm.projector.weight",
        "model.text_hidden_fcs.0.2.bias": "seg_head.fc2.bias",
        "lm_head.weight": "mllm.llama.lm_head.weight",
        "model.visual_model.no_mem_embed": "segmenter.sam.no_mem_embed",
    }
    return rename_one(folder, *rng.choice(sorted(names.items())))


def swap_prefix(folder: Path, rng: random.Random) -> str:
    old = any_name(folder, rng, lambda name, _: name.startswith("model.visual_model."))
    return rename_one(folder, old, old.replace("visual_model", "vision_model"))


def transpose(folder: Path, rng: random.Random) -> str:
    def is_oblong(name: str, value: torch.Tensor) -> bool:
        return value.ndim == 2 and value.shape[0] != value.shape[1]

    name = change_one(folder, rng, lambda value: value.T.contiguous(), is_oblong)
    columns, rows = read_tensors(folder)[name].shape
    return f"1 wrong shape; {DROPPED}; wrong shape: {name} is ({columns}, {rows}), expected ({rows}, {columns})"


def cut_rows(folder: Path, rng: random.Random) -> str:
    def has_rows(name: str, value: torch.Tensor) -> bool:
        return is_weight(name, value) and value.shape[0] > 1

    return f"wrong shape: {change_one(folder, rng, lambda value: value[:-1].clone(), has_rows)} is ("


def extra_dimension(folder: Path, rng: random.Random) -> str:
    """Which copying would have broadcast."""
    return f"wrong shape: {change_one(folder, rng, lambda value: value[None].clone())} is (1,"


def integers(folder: Path, rng: random.Random) -> str:
    dtype = rng.choice([torch.int8, torch.int64, torch.uint8, torch.bool])
    name = change_one(folder, rng, lambda value: value.to(dtype))
    return f"bad values: {name} is {str(dtype).removeprefix('torch.')}, expected floating point"


def not_a_number(folder: Path, rng: random.Random) -> str:
    def poison(value: torch.Tensor) -> torch.Tensor:
        value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf")])
        return value

    return f"bad values: {change_one(folder, rng, poison)} holds 1 values that are NaN or infinite"


def extra(folder: Path, rng: random.Random) -> str:
    name = f"model.layers.{rng.randrange(2)}.self_attn.q_proj.bias"
    rewrite_weights(folder, lambda raw: raw.update({name: torch.zeros(64)} if "lm_head.weight" in raw else {}))
    return f"1 unexpected, 0 wrong shape; {DROPPED}; unexpected: {name}"


def twice(folder: Path, rng: random.Random) -> str:
    """Without an index nothing says which of two copies counts."""
    (folder / INDEX).unlink()
    first, second = sorted(folder.glob("pytorch_model-*.bin"))
    name = rng.choice(sorted(read_tensors(first)))
    torch.save(read_copies(second) | {name: torch.zeros(1)}, second)
    return f"{second} repeats tensors of another file in {folder}: {name}"


def cut_shard(folder: Path, rng: random.Random) -> str:
    file = any_shard(folder, rng)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return f"weights {file} do not decode"


def no_shard(folder: Path, rng: random.Random) -> str:
    file = any_shard(folder, rng)
    file.unlink()
    return f"{folder / INDEX} names the shard '{file.name}', which is not in {folder}"


def no_shard_no_index(folder: Path, rng: random.Random) -> str:
    (folder / INDEX).unlink()
    number = rng.choice((1, 2))
    (folder / f"pytorch_model-0000{number}-of-00002.bin").unlink()
    return f"{folder} lacks shards [{number}] of 2"


def bad_index(folder: Path, rng: random.Random) -> str:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(rng.choice([text[: rng.randrange(len(text))], "[]", "{}"]))
    return f"{folder / INDEX} is no index"


def outside_shard(folder: Path, rng: random.Random) -> str:
    """An index does not reach out of its folder."""
    file = any_shard(folder, rng)
    file.rename(folder.parent / file.name)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(file.name, f"../{file.name}"))
    return f"names the shard '../{file.name}', which is not in {folder}"


def code(folder: Path, rng: random.Random) -> str:
    file = any_shard(folder, rng)
    torch.save(read_copies(file) | {"run": Path("code in a pickle")}, file)
    return f"weights {file} do not decode"


def clip_tensor(folder: Path, rng: random.Random) -> str:
    file = folder.parent / "clip" / "pytorch_model.bin"
    tensors = read_copies(file)
    name = rng.choice(sorted(tensors))
    del tensors[name]
    torch.save(tensors, file)
    counts = f"{len(tensors)} matched, 1 missing, 0 unexpected, 0 wrong shape"
    return f"weights of {file.parent} do not fit: {counts}; missing: {name}"


DAMAGES = [
    drop,
    drop_but_list,
    drop_frequencies,
    other_frequencies,
    integer_frequencies,
    rename,
    rename_to_ours,
    swap_prefix,
    transpose,
    cut_rows,
    extra_dimension,
    integers,
    not_a_number,
    extra,
    twice,
    cut_shard,
    no_shard,
    no_shard_no_index,
    bad_index,
    outside_shard,
    code,
    clip_tensor,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_stops_with_a_message_that_names_it(released_copy: Path, damage: Damage) -> None:
    check_named(damage, released_copy)
