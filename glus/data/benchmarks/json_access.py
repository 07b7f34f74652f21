"""JSON as the readers want it: every field checked, every error with its file and its place in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glus.files import read_json
from glus.types import Expression


@dataclass(frozen=True)
class Entry:
    """One expression of a file in which videos hold frames and expressions by id."""

    expression: Expression
    """What all such files say about it: neither objects nor group."""
    value: dict[str, Any]
    """All that the file says about it."""
    where: str
    """File and place, for messages."""


def field(mapping: Any, key: str, kind: type, where: str) -> Any:
    """``mapping[key]``, checked to be of type ``kind``."""
    if not isinstance(mapping, dict) or not isinstance(mapping.get(key), kind):
        found = type(mapping.get(key)).__name__ if isinstance(mapping, dict) and key in mapping else "nothing"
        raise ValueError(f"{where}: expected a {kind.__name__} under {key!r}, found {found}")
    return mapping[key]


def whole_number(mapping: dict[str, Any], key: str, where: str) -> int:
    """``mapping[key]`` as an int from 0; the file may have it as a number or as text."""
    value = mapping.get(key)
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{where}: expected a whole number under {key!r}, found {value!r}")
    return int(str(value))


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
