"""MeViS (versions 1 and 2), ReVOS and LV-VIS: expressions that list their objects and annotations.

``{"videos": {video: {"frames": [...], "expressions": {exp_id: {"exp": ..., "obj_id": [...], "anno_id": [...]}}}}}``.
An annotation id addresses an entry of ``mask_dict.json``. Both lists are empty where nothing fits the sentence (MeViS
version 2, ReVOS), and left out where the masks are not public.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.data.benchmarks.json_access import Entry, read_entries, read_videos, require_all_or_none, whole_number
from glus.types import Expression

REVOS_GROUPS = ("referring", "reasoning", "non-existent")
"""What ReVOS' ``type_id`` 0, 1 and 2 mean."""


def read_mevis(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """MeViS."""
    return [_expression(dataset, entry) for entry in _entries(path)]


def read_lvvis(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """LV-VIS: the sentence is the name of a category, whose underscores become spaces (as in VISA)."""
    return [_expression(dataset, entry, text=entry.text.replace("_", " ")) for entry in _entries(path)]


def read_revos(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """ReVOS: the group of an expression is its ``type_id``. Ids of videos contain slashes."""
    return [_expression(dataset, entry, group=_revos_group(entry)) for entry in _entries(path)]


def _entries(path: Path) -> list[Entry]:
    entries = list(read_entries(path, read_videos(path)))
    require_all_or_none(path, entries, "obj_id")
    return entries


def _expression(dataset: DatasetConfig, entry: Entry, text: str | None = None, group: str = "") -> Expression:
    object_ids, annotation_ids = _ids(entry, "obj_id"), _ids(entry, "anno_id")
    if len(object_ids) != len(annotation_ids):
        raise ValueError(
            f"{entry.where}: {len(object_ids)} obj_id but {len(annotation_ids)} anno_id; expected as many of both"
        )
    return Expression(
        dataset.name, entry.video, entry.exp_id, entry.text if text is None else text, entry.frames,
        tuple(object_ids), tuple(str(i) for i in annotation_ids), group,
    )  # fmt: skip


def _ids(entry: Entry, key: str) -> list[int]:
    ids: Any = entry.value.get(key, [])
    if not isinstance(ids, list) or not all(str(i).isdecimal() for i in ids):
        raise ValueError(f"{entry.where}: expected a list of whole numbers under {key!r}, found {ids!r:.80}")
    return [int(i) for i in ids]


def _revos_group(entry: Entry) -> str:
    number = whole_number(entry.value, "type_id", entry.where)
    if number >= len(REVOS_GROUPS):
        raise ValueError(f"{entry.where}: type_id {number}; expected 0, 1 or 2 ({', '.join(REVOS_GROUPS)})")
    return REVOS_GROUPS[number]
