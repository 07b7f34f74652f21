"""Key frames: the frame from which the prediction of a sentence starts, in the format that the authors publish.

``{"<video>_<exp_id>": <name of the frame as a number>}`` (released inference_iter.py:229-240).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from glus.files import read_object, write_text
from glus.types import Expression

NAMED_IN_MESSAGE = 3
"""Expressions that a message lists."""


def read_key_frames(path: str | Path, expressions: Sequence[Expression]) -> dict[str, int]:
    """The key frames of some expressions; those that the file has for others are left aside.

    Args:
        path: JSON in the published format.
        expressions: each must have an entry.

    Returns:
        ``Expression.name`` -> index of its key frame among ``Expression.frames``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such JSON, lacks an expression, or names a frame that the video does not have.
    """
    entries = _read_entries(Path(path))
    keys = _keys(expressions)
    missing = [expression.name for key, expression in keys.items() if key not in entries]
    if missing:
        raise ValueError(
            f"inference.key_frames={path} has no entry for {len(missing)} of {len(keys)} expressions: "
            f"{', '.join(missing[:NAMED_IN_MESSAGE])}{', ...' if len(missing) > NAMED_IN_MESSAGE else ''}; "
            "expected '<video>_<exp_id>' for each (scripts/score_frames.py writes them)"
        )
    return {expression.name: _index(entries[key], expression, path) for key, expression in keys.items()}


def write_key_frames(path: str | Path, key_frames: Iterable[tuple[Expression, int]]) -> None:
    """Write the published format, whole or not at all.

    Args:
        path: the file; replaced if it exists.
        key_frames: expressions, each with the index of its key frame among its frames.

    Raises:
        ValueError: two expressions would have the same entry.
        OSError: it cannot be written.
    """
    pairs = list(key_frames)
    keys = _keys([expression for expression, _ in pairs])
    entries = {key: _number(e.frames[index]) for (key, e), (_, index) in zip(keys.items(), pairs, strict=True)}
    write_text(Path(path), json.dumps(entries, indent=1) + "\n")


def _keys(expressions: Iterable[Expression]) -> dict[str, Expression]:
    """Entry -> expression."""
    keys: dict[str, Expression] = {}
    for expression in expressions:
        key = f"{expression.video}_{expression.exp_id}"
        if key in keys:
            raise ValueError(
                f"{keys[key].name} and {expression.name} would both be {key!r} in a file of key frames, which cannot "
                "tell them apart"
            )
        keys[key] = expression
    return keys


def _read_entries(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"inference.key_frames={path}: no such file (scripts/score_frames.py writes one)")
    return read_object(path)


def _index(wanted: object, expression: Expression, path: str | Path) -> int:
    numbers = [_number(name) for name in expression.frames]
    is_name = isinstance(wanted, int | str) and not isinstance(wanted, bool)
    if not is_name or _number(str(wanted)) not in numbers:
        first, last = expression.frames[0], expression.frames[-1]
        raise ValueError(
            f"inference.key_frames={path}: {expression.name} has key frame {wanted!r}; expected the number of one of "
            f"its {len(numbers)} frames, {first} to {last}"
        )
    return numbers.index(_number(str(wanted)))


def _number(name: str) -> int | str:
    """What stands for a frame: its name as a number, or as it is where it is none."""
    return int(name) if name.isdecimal() else name
