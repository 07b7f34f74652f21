"""MeViS (versions 1 and 2), ReVOS and LV-VIS: expressions that list their objects and annotations.

``{"videos": {video: {"frames": [...], "expressions": {exp_id: {"exp": ..., "obj_id": [...], "anno_id": [...]}}}}}``.
An annotation id addresses an entry of ``mask_dict.json``. Both lists are empty where nothing fits the sentence (MeViS
version 2, ReVOS), and left out where the masks are not public.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.data.benchmarks.json_access import Entry, read_entries, whole_number
from glus.types import Expression

REVOS_GROUPS = ("referring", "reasoning", "non-existent")
"""What ReVOS' ``type_id`` 0, 1 and 2 mean."""


def read_mevis(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """MeViS."""
    return [_expression(entry) for entry in read_entries(dataset.name, path, "obj_id")]


def read_lvvis(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """LV-VIS: the sentence is the name of a category, whose underscores become spaces (as in VISA)."""
    return [replace(found, text=found.text.replace("_", " ")) for found in read_mevis(dataset, path, masks)]


def read_revos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """ReVOS: the group of an expression is its ``type_id``. Ids of videos contain slashes."""
    expressions = []
    for entry in read_entries(dataset.name, path, "obj_id"):
        number = whole_number(entry.value, "type_id", entry.where)
        if number >= len(REVOS_GROUPS):
            raise ValueError(f"{entry.where}: type_id {number}; expected 0, 1 or 2 ({', '.join(REVOS_GROUPS)})")
        expressions.append(replace(_expression(entry), group=REVOS_GROUPS[number]))
    return expressions


def _expression(entry: Entry) -> Expression:
    objects, annotations = _ids(entry, "obj_id"), _ids(entry, "anno_id")
    if len(objects) != len(annotations):
        raise ValueError(
            f"{entry.where}: {len(objects)} obj_id but {len(annotations)} anno_id; expected as many of both"
        )
    return replace(entry.expression, object_ids=objects, annotation_ids=tuple(map(str, annotations)))


def _ids(entry: Entry, key: str) -> tuple[int, ...]:
    ids: Any = entry.value.get(key, [])
    if not isinstance(ids, list) or not all(str(i).isdecimal() for i in ids):
        raise ValueError(f"{entry.where}: expected a list of whole numbers under {key!r}, found {ids!r:.80}")
    return tuple(int(i) for i in ids)
