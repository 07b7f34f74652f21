"""JSON files read strictly: what is wrong is said with the name of the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_json(path: Path, encodings: Sequence[str] = ("utf-8",)) -> Any:
    """The content of a file, in the first of these encodings that it can be in.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or in none of the encodings, or an object has a key twice (json would silently keep
            the last).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    text = _decode(path, encodings)
    try:
        return json.loads(text, object_pairs_hook=distinct_keys)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object that a file in UTF-8 holds.

    Raises:
        FileNotFoundError, ValueError: as ``read_json``; or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of ``json.loads``: ValueError for a key that stands twice, of which json keeps the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice beside {', '.join(map(repr, keys[:3]))}, ...")
    return found


def _decode(path: Path, encodings: Sequence[str]) -> str:
    data = path.read_bytes()
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            reason = str(error)
    raise ValueError(f"{path} is not text in {' or '.join(encodings)}: {reason}")
