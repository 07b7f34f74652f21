"""MeViS (versions 1 and 2), ReVOS, Ref-SAV and LV-VIS: expressions that list their objects and annotations.

``{"videos": {video: {"frames": [...], "expressions": {exp_id: {"exp": ..., "obj_id": [...], "anno_id": [...]}}}}}``.
An annotation id addresses an entry of ``mask_dict.json``. Both lists are empty where nothing fits the sentence (MeViS
version 2, ReVOS), and left out where the masks are not public.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.files import field, read_json, whole_number
from glus.types import Expression

REVOS_GROUPS = ("referring", "reasoning", "non-existent")
"""What ReVOS' ``type_id`` 0, 1 and 2 mean."""
REF_SAV_GROUPS = ("long", "short")
"""What Ref-SAV's ``type_id`` 0 and 1 mean: descriptions of an object, of many words and of few."""


@dataclass(frozen=True)
class Entry:
    """One expression of a file in which videos hold frames and expressions by id."""

    expression: Expression
    """What all such files say about it: neither objects nor group."""
    value: dict[str, Any]
    """All that the file says about it."""
    where: str
    """File and place, for messages."""


def iterate_videos(path: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any], str]]:
    """(video, its frames as the file spells them, its content, its place for messages) of an expression file.

    Raises:
        ValueError: there are no ``videos``, or one has no frames, one twice, or anything but text.
    """
    for video, content in field(read_json(path), "videos", dict, str(path)).items():
        where = f"{path}: videos[{video!r}]"
        frames = field(content, "frames", list, where)
        if not frames or len(set(map(str, frames))) != len(frames) or not all(isinstance(name, str) for name in frames):
            raise ValueError(f"{where}.frames: expected distinct frame names, found {frames[:5]}")
        yield video, tuple(frames), content, where


def read_entries(dataset: str, path: Path, all_or_none: str = "exp") -> list[Entry]:
    """The expressions of ``{"videos": {video: {frames: [...], expressions: {exp_id: {exp: ...}}}}}``.

    Videos in the file's order, expressions in numeric order ("2" before "10") where all are numbers.

    Args:
        dataset: its name.
        path: the file.
        all_or_none: a key that a split has in every expression or in none: a single gap would be taken for "no object".

    Raises:
        ValueError: a field is missing or of another type, or some expressions have that key and others have not.
    """
    entries = []
    for video, frames, content, where in iterate_videos(path):
        expressions = field(content, "expressions", dict, where)
        for exp_id in sorted(expressions, key=int) if all(map(str.isdecimal, expressions)) else expressions:
            inside = f"{where}.expressions[{exp_id!r}]"
            text = field(expressions[exp_id], "exp", str, inside)
            entries.append(Entry(Expression(dataset, video, exp_id, text, frames, (), ()), expressions[exp_id], inside))
    without = [entry.expression for entry in entries if all_or_none not in entry.value]
    if 0 < len(without) < len(entries):
        first = f"{without[0].video}/{without[0].exp_id}"
        raise ValueError(f"{path}: {len(without)} expressions have no {all_or_none!r} though others do; first: {first}")
    return entries


def read_mevis(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """MeViS."""
    return [_expression(entry) for entry in read_entries(dataset.name, path, "obj_id")]


def read_lvvis(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """LV-VIS: the sentence is the name of a category, whose underscores become spaces (as in VISA)."""
    return [replace(found, text=found.text.replace("_", " ")) for found in read_mevis(dataset, path, masks)]


def read_revos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """ReVOS: the group of an expression is its ``type_id``. Ids of videos contain slashes."""
    return _read_types(dataset, path, REVOS_GROUPS)


def read_ref_sav(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """Ref-SAV: as ReVOS, with other groups.

    Source: bytedance/Sa2VA, tools/eval/eval_ref_sav.py (fields, groups), projects/sa2va/evaluation/ref_vos_eval.py
    (places); the frames are ``videos/<video>/<frame>.jpg`` in PolyU-ChenLab/UniPixel as well.
    """
    return _read_types(dataset, path, REF_SAV_GROUPS)


def _read_types(dataset: DatasetConfig, path: Path, groups: Sequence[str]) -> list[Expression]:
    expressions = []
    for entry in read_entries(dataset.name, path, "obj_id"):
        number = whole_number(entry.value, "type_id", entry.where)
        if number >= len(groups):
            raise ValueError(f"{entry.where}: type_id {number}; expected 0 to {len(groups) - 1} ({', '.join(groups)})")
        expressions.append(replace(_expression(entry), group=groups[number]))
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
