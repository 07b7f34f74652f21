"""Files and folders that are there complete or not at all, and JSON that is read strictly.

What is written lies under a hidden name beside its own until it is complete; then it is renamed. If an error ends the
writing, the hidden file or folder is deleted, and so are the folders that were made for it. If the process is killed,
it stays until the next attempt at the same name replaces it: so two processes must not write the same name at once.
Only ``write_text`` allows that, with one hidden name per process, of which a killed one's stays. All this holds against
a killed process, not against a power cut: nothing is forced to disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROJECT = next(f for f in Path(__file__).resolve().parents if (f / "configs").is_dir())
"""Holds ``configs/``, ``scripts/``, ``tools/`` and ``assets/``: a checkout, or the package that was made of one."""


def hidden_sibling(path: Path) -> Path:
    """Where ``path`` is prepared before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system while writing below ``path`` into one that says where, and how much room is left.

    Raises:
        OSError: the disk is full, a quota is used up, the folder is read-only, ...
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # named already, or not the system's
            raise
        place = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(place).free / 2**20
        where = error.filename2 or error.filename or path  # filename2: the new name, where a rename failed
        raise OSError(
            f"cannot write {where}: {error.strerror} ({free:,.0f} MiB free below {place}); "
            "make room or choose another place, and run the same command again: what is finished is kept"
        ) from error


@contextmanager
def _renamed(temporary: Path, path: Path, replace: bool = False) -> Iterator[None]:
    """Give what is prepared in the block its name, or delete it on an error, with the folders made for it."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        with naming_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
        with naming_write_errors(path):
            if replace and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    except BaseException:
        _delete(temporary)
        for folder in missing:
            with suppress(OSError):  # not empty: somebody else uses it meanwhile
                folder.rmdir()
        raise


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Where to write a file, which takes the name ``path`` at the end, and is deleted on an error.

    Raises:
        OSError: its folder, which is made if need be, cannot be written.
    """
    with _renamed(hidden_sibling(path), path):
        yield hidden_sibling(path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8; its folder is made if need be.

    Of several processes of a machine that do so at once, the last one's text stays.

    Raises:
        OSError: it cannot be written; the message says where and how much room is left.
    """
    temporary = hidden_sibling(path.with_name(f"{path.name}.{os.getpid()}"))
    with naming_write_errors(path), _renamed(temporary, path):
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name ``path`` at the end, and is deleted on an error.

    Args:
        path: there may be an empty folder.
        replace: there may be any folder; it is deleted at the end.

    Raises:
        OSError: it cannot be written, or holds files that are not to be replaced.
    """
    temporary = hidden_sibling(path)
    with _renamed(temporary, path, replace):
        with naming_write_errors(path):
            _delete(temporary)
            temporary.mkdir()
        yield temporary


def read_json(path: Path, encodings: Sequence[str] = ("utf-8",)) -> Any:
    """The content of a file, in the first of these encodings that it can be in.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or in none of the encodings, or an object has a key twice (json would silently keep
            the last).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    data, reason = path.read_bytes(), ""
    for encoding in encodings:
        try:
            return json.loads(data.decode(encoding), object_pairs_hook=distinct_keys)
        except UnicodeDecodeError as error:
            reason = str(error)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    raise ValueError(f"{path} is not text in {' or '.join(encodings)}: {reason}")


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


def cache_folder() -> Path:
    """Where things lie that are made again if they are gone: ``$XDG_CACHE_HOME/glus``, by default ``~/.cache/glus``."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "glus"
