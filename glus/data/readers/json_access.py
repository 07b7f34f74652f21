"""JSON as the readers want it: every field checked, every error with its file and its place in the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def read_json(path: Path, encodings: Sequence[str] = ("utf-8",)) -> Any:
    """The content of a file, in the first of these encodings that it can be in.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or in none of the encodings, or an object has a key twice (json would silently keep
            the last).
    """
    text = _decode(path, encodings)
    try:
        return json.loads(text, object_pairs_hook=distinct_keys)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _decode(path: Path, encodings: Sequence[str]) -> str:
    data = path.read_bytes()
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            reason = str(error)
    raise ValueError(f"{path} is not text in {' or '.join(encodings)}: {reason}")


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


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of ``json.loads``: ValueError for a key that stands twice, of which json keeps the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice beside {', '.join(map(repr, keys[:3]))}, ...")
    return found
