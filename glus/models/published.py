"""Folders of whole families as transformers' ``save_pretrained`` writes them: config, weights, tokenizer; and back.

LLaVA's parts come from several places instead: see ``release_layout.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glus.config import ModelConfig
from glus.files import atomic_folder, read_object
from glus.models.mllm import Mllm
from glus.models.release_layout import KeyMap
from glus.models.weight_files import LazyTensor, Tensors, write_shards
from glus.models.weights import Source, read_tensors
from glus.tokens import SEG, JsonVocabulary

_PLAIN_ROTARY = {"rope_type": "default", "partial_rotary_factor": 1}


def published_source(config: ModelConfig, mllm: Mllm, place: str) -> Source:
    """All tensors of a family's folder, under our names. Rows of tables that it lacks are the mean of the others.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: its config.json says another thing than our settings.
    """
    check_published_config(Path(place), config, mllm)
    source = KeyMap(mllm.PUBLISHED).source(place, read_tensors(place))
    for name in (f"{mllm.decoder.prefix}embed_tokens.weight", f"{mllm.decoder.owner_prefix}lm_head.weight"):
        if name in source.tensors:
            source.tensors[name] = with_new_rows(LazyTensor.of(source.tensors[name]), config.llm.vocab_size)
    return source


def with_new_rows(table: LazyTensor, num_rows: int) -> LazyTensor:
    """A table with as many rows as are wanted; as it is if it has as many or more."""
    count = num_rows - table.shape[0]
    if count <= 0:
        return table

    def read() -> torch.Tensor:
        known = table.read()
        mean = known.float().mean(0, keepdim=True).to(known.dtype)
        return torch.cat([known, mean.expand(count, -1)])

    return LazyTensor(torch.Size((num_rows, *table.shape[1:])), table.dtype, read)


def check_published_config(folder: Path, config: ModelConfig, mllm: Mllm) -> None:
    """That a folder's config.json, if it has one, says what our settings say: most of it shows in no tensor's shape.

    Raises:
        ValueError: a field differs.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    content = read_object(file)
    stated = {"model.llm.tied": (config.llm.tied, content.get("tie_word_embeddings", config.llm.tied))}
    # Qwen2.5-VL has the LLM's fields beside the tower.
    theirs = {"llm": content.get("text_config", content), "vision": content.get("vision_config", {})}
    for part, fields in theirs.items():
        stated |= {
            f"model.{part}.architecture.{key}": (value, fields[key])
            for key, value in getattr(config, part).architecture.items()
            if key in fields and key != "rope_parameters"
        }
    rotary = _PLAIN_ROTARY | mllm.decoder.text.config.rope_parameters
    stated |= {
        f"model.llm.architecture.rope_parameters.{key}": (rotary.get(key), value)
        for key, value in _rotary_settings(theirs["llm"]).items()
    }
    for key, (value, published) in stated.items():
        if _as_list(value) != _as_list(published):
            raise ValueError(
                f"{key}={_as_list(value)}, but {file} says {_as_list(published)}: set {key}={_as_list(published)}"
            )


def _rotary_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """What a config states of the rotary embedding, as transformers 4 or 5 spells it, in the spelling of 5."""
    stated = {key: text[key] for key in ("rope_theta", "partial_rotary_factor") if text.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        value = text.get(key) or {}
        stated |= value if isinstance(value, dict) else {key: value}
    kind = stated.pop("type", "default")
    kind = stated.setdefault("rope_type", kind)
    if kind == "dynamic":  # it scales nothing before max_position_embeddings, where ours end
        stated.pop("factor", None)
    return stated | {"rope_type": "default"} if kind in ("dynamic", "mrope") else stated


def save_published(
    folder: Path, mllm: Any, tensors: Tensors, vocabulary: JsonVocabulary, is_tied: bool, shard_bytes: int
) -> int:
    """Write an MLLM as transformers reads it: ``AutoModelForImageTextToText.from_pretrained``. It appears whole or not
    at all. [SEG] is a token of its tokenizer.

    Args:
        folder: must not exist.
        mllm: built as the tensors are; its ``net`` says the architecture.
        tensors: merged state dict of the whole network; what is not the MLLM's stays out.
        vocabulary: the model's.
        is_tied: the head is the embedding table. Where new rows were trained it is not, and reading such a folder as
            tied would lose the head.
        shard_bytes: of a weights file at most.

    Returns:
        How many tensors were written.

    Raises:
        OSError: it cannot be written, or is there.
    """
    prefix = mllm.PUBLISHED[-1][1]  # of the names that transformers' class has today
    ours = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    config = {**mllm.net.config.to_dict(), "tie_word_embeddings": is_tied, "architectures": [type(mllm.net).__name__]}
    config["text_config"] = {**config["text_config"], "tie_word_embeddings": is_tied}
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2, default=list) + "\n")
        for name in vocabulary.files:
            shutil.copyfile(vocabulary.folder / name, temporary / name)
        _add_seg(temporary / "tokenizer.json", vocabulary.seg_id)
        write_shards(temporary, ours, "safetensors", shard_bytes, {"format": "pt"})
    return len(ours)


def _add_seg(file: Path, seg_id: int) -> None:
    content = json.loads(file.read_text())
    if all(row["content"] != SEG for row in content["added_tokens"]):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"].append({"id": seg_id, "content": SEG, **plain, "special": True})
        file.write_text(json.dumps(content, ensure_ascii=False))


def _as_list(value: Any) -> Any:
    """Sequences of YAML and JSON, which are of several types, as one."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
