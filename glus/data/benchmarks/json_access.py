"""JSON as the readers want it: every field checked, every error with its file and its place in the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glus.files import read_json


@dataclass(frozen=True)
class Entry:
    """One expression of a file in which videos hold frames and expressions by id."""

    video: str
    exp_id: str
    text: str
    frames: tuple[str, ...]
    value: dict[str, Any]
    """What the file says about the expression."""
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


def read_videos(path: Path) -> dict[str, Any]:
    """The ``videos`` of an expression file."""
    videos: dict[str, Any] = field(read_json(path), "videos", dict, str(path))
    return videos


def frame_names(entry: Any, where: str) -> tuple[str, ...]:
    """A video's frames as the file spells them.

    Raises:
        ValueError: none, one twice, or anything but text.
    """
    frames = field(entry, "frames", list, where)
    if not frames or len(set(map(str, frames))) != len(frames) or not all(isinstance(name, str) for name in frames):
        raise ValueError(f"{where}.frames: expected distinct frame names, found {frames[:5]}")
    return tuple(frames)


def read_entries(path: Path, videos: dict[str, Any]) -> Iterator[Entry]:
    """The expressions of ``{video: {frames: [...], expressions: {exp_id: {exp: ...}}}}``.

    Videos in the file's order, expressions in numeric order.

    Args:
        path: the file, for messages.
        videos: its content.
    """
    for video, content in videos.items():
        where = f"{path}: videos[{video!r}]"
        frames = frame_names(content, where)
        for exp_id, value in _numeric_order(field(content, "expressions", dict, where)):
            inside = f"{where}.expressions[{exp_id!r}]"
            yield Entry(video, exp_id, field(value, "exp", str, inside), frames, value, inside)


def require_all_or_none(path: Path, entries: Iterable[Entry], key: str) -> None:
    """A split names ``key`` in every expression or in none: a single gap would be taken for "no object".

    Raises:
        ValueError: some have it, others have not.
    """
    entries = list(entries)
    without = [entry for entry in entries if key not in entry.value]
    if without and len(without) < len(entries):
        first = f"{without[0].video}/{without[0].exp_id}"
        raise ValueError(f"{path}: {len(without)} expressions have no {key!r} though others do; first: {first}")


def _numeric_order(expressions: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Items in numeric order of their keys where all are numbers ("2" before "10"), else in file order."""
    if all(key.isdecimal() for key in expressions):
        return sorted(expressions.items(), key=lambda item: int(item[0]))
    return expressions.items()
