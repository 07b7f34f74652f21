"""What decides the masks: predictions of one folder are of one model, one split and one set of settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glus.config import DatasetConfig, ModelFolderConfig
from glus.types import Expression

Identity = dict[str, Any]
"""Nested JSON values; two equal identities give equal predictions."""


def prediction_identity(
    dataset: DatasetConfig,
    expressions: Iterable[Expression],
    model_folder: Path,
    settings: ModelFolderConfig,
    key_frames: str | Path | None = None,
) -> Identity:
    """What decides the masks.

    Args:
        dataset: its name and split; where it lies does not matter.
        expressions: all of the split; their hash tells a generated benchmark from one generated anew.
        model_folder: the contents of its weights and vocabulary count, not its place.
        settings: the model folder's, with this run's overrides and precision; not what decides memory and speed alone,
            so that a run that needed too much memory can be continued with less.
        key_frames: the file of key frames, whose contents count.
    """
    values: Any = OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True)
    for irrelevant in ("tokenizer", "lora_dropout"):
        del values["model"]["llm"][irrelevant]
    for irrelevant in ("chunk_frames", "token_budget", "memory_gb"):
        del values["inference"][irrelevant]
    names = ("model*.safetensors", "trained.safetensors", "tokenizer.model", "added_tokens.json")
    files = sorted(file for name in names for file in model_folder.glob(name))  # without a checkpoint's optimizer
    with ThreadPoolExecutor() as pool:  # files of many gigabytes, side by side
        digests = dict(zip((file.name for file in files), pool.map(_sha256, files), strict=True))
    sentences = "\n".join(json.dumps([e.video, e.exp_id, e.text, e.frames]) for e in expressions)
    return {
        "dataset": {
            "name": dataset.name,
            "split": dataset.split,
            "expressions": hashlib.sha256(sentences.encode()).hexdigest(),
        },
        "weights": digests,
        "key_frames": _sha256(Path(key_frames)) if key_frames else None,
        **values,
    }


def differences(there: Identity, now: Identity) -> list[str]:
    """A line for every value that differs: ``key: one there, another now``."""
    old, new = (dict(_flatten(identity)) for identity in (there, now))
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} now" for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries under dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
