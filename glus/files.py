"""Files and folders that are there complete or not at all, and JSON that is read strictly.

What is written lies under a hidden name beside its own until it is complete; then it is renamed. If an error ends the
writing, the hidden file or folder is deleted, and so are the folders that were made for it. If the process is killed,
it stays until the next attempt at the same name replaces it: so two processes must not write the same name at once.
Only ``write_text`` and whoever says ``is_contested`` may do that, each under a hidden name of its own, which stays if
its process is killed. All this holds against a killed process, not against a power cut: nothing is forced to disk.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROJECT = next(f for f in Path(__file__).resolve().parents if (f / "configs").is_dir())
"""Holds ``configs/``, ``scripts/``, ``tools/`` and ``assets/``: a checkout, or the package that was made of one."""
SHIPPED = ("glus_shapes", "glus_towers")
"""Names of what comes with the project: a small model, and the parts that it was made from."""
OWN_PREFIX = ".glus."
"""Of what lies inside a folder while its contents are being replaced."""
BLOCK_BYTES = 4096
"""What even the smallest file takes of a disk."""
_ADVICE = {
    errno.EBUSY: "it is in use, as a mount point is: choose a folder in it, or another place",
    errno.EEXIST: "something else has this name: choose another",
    errno.EISDIR: "a folder has this name: choose another",
    errno.ELOOP: "links point at each other: choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another place",
    errno.ENOTEMPTY: "choose a new or empty folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to"),
}


def find_shipped(path: str) -> str:
    """Where a path lies that begins with one of ``SHIPPED``, unless something here has its name; else ``path``."""
    return str(PROJECT / "assets" / path) if path.split("/")[0] in SHIPPED and not os.path.exists(path) else path


def expanded(path: str | Path) -> Path:
    """A path with the ``~`` or ``~user`` that it begins with expanded.

    Raises:
        ValueError: nobody knows that home folder.
    """
    text = os.path.expanduser(path)
    if text.startswith("~") and (text == "~" or "/" in text):
        raise ValueError(f"{text!r}: expected the whole path, as no home folder of this user is known")
    return Path(text)


def hidden_sibling(path: Path) -> Path:
    """Where ``path`` is prepared before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system while writing below ``path`` into one that says where, how much room is left, and
    what to do about an error of this kind.

    Raises:
        OSError: the disk is full, a quota is used up, the folder is read-only, ...
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # named already, or not the system's
            raise
        place = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
        free = shutil.disk_usage(place).free / 2**20
        where = error.filename2 or error.filename or path  # filename2: the new name, where a rename failed
        advice = _ADVICE.get(error.errno or 0, "make room or choose another place, and run the same command again")
        raise OSError(
            f"cannot write {where}: {error.strerror} ({free:,.0f} MiB free below {place}); {advice}"
        ) from error


def check_target(path: Path, is_file: bool = False) -> None:
    """Raise what writing to ``path`` would raise in the end, as far as that can be known before.

    Args:
        path: of a file or folder, which need not exist, nor its folder.
        is_file: which of the two.

    Raises:
        OSError: it is the other of the two, or a file that is a mount point and so cannot be replaced, its name is too
            long, or its place may not be written.
    """
    with naming_write_errors(path):
        if is_file and os.path.isdir(path):
            raise _system_error(errno.EISDIR, path)
        if is_file and os.path.ismount(path):
            raise _system_error(errno.EBUSY, path)
        place = path.parent if is_file else path
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            raise _system_error(errno.ENOTDIR, place)
        if not os.access(place, os.W_OK | os.X_OK):
            raise _system_error(errno.EACCES, place)


def require_room(folder: Path, num_files: int) -> None:
    """Raise OSError unless the disk below an existing folder has room for so many files, however small."""
    free, needed = shutil.disk_usage(folder).free, num_files * BLOCK_BYTES
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.1f} MiB free, but {num_files:,} files take at least "
            f"{needed / 2**20:,.1f}: make room or choose another place"
        )


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process left that was killed while it replaced the contents."""
    return all(entry.name.startswith(OWN_PREFIX) for entry in folder.iterdir())


def _is_there(path: Path) -> bool:
    """As ``Path.exists``, which hides that a name is too long or runs through a file."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _system_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


@contextmanager
def _with_parents(path: Path) -> Iterator[None]:
    """Make the folders above ``path``, and delete what was made of them if the block fails."""
    missing = [folder for folder in path.absolute().parents if not os.path.exists(folder)]
    try:
        with naming_write_errors(path):
            Path(os.path.realpath(path.parent)).mkdir(parents=True, exist_ok=True)  # a link may point to nothing yet
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # not empty: somebody else uses it meanwhile
                folder.rmdir()
        raise


@contextmanager
def _deleted_on_error(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _delete(temporary)
        raise


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, is_contested: bool = False) -> Iterator[Path]:
    """Where to write a file, which takes the name ``path`` at the end, and is deleted on an error.

    Args:
        path: of the file; its folder is made if need be.
        is_contested: several processes, also of several machines, may write it at once.

    Raises:
        OSError: its folder cannot be written.
    """
    temporary = hidden_sibling(path.with_name(f"{path.name}.{secrets.token_hex(4)}") if is_contested else path)
    with _with_parents(path), _deleted_on_error(temporary):
        yield temporary
        with naming_write_errors(path):
            os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8; its folder is made if need be.

    Of several processes that do so at once, also on several machines, the last one's text stays.

    Raises:
        OSError: it cannot be written; the message says where and how much room is left.
    """
    with naming_write_errors(path), atomic_file(path, is_contested=True) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # halves of characters in sentences


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name ``path`` at the end, and is deleted on an error.

    A folder that is there already is kept where it cannot be renamed: it is a mount point, or holds what is to be
    replaced. Then the contents are moved one by one, the old ones out of the way first and deleted last; an error on
    the way moves them back.

    Args:
        path: there may be an empty folder, a mount point, or a link to either.
        replace: there may be any folder; what it holds is deleted at the end.

    Raises:
        OSError: it cannot be written, or holds files that are not to be replaced; this is found out at the beginning.
            Should the last step fail for another reason, the message says where all that was written lies.
    """
    path = Path(os.path.realpath(path))
    with _with_parents(path):
        with naming_write_errors(path):
            if os.path.lexists(path) and not (replace or is_empty(path)):
                raise _system_error(errno.ENOTEMPTY, path)
            temporary = _new_folder_for(path)
        with _deleted_on_error(temporary):
            yield temporary
        try:
            with naming_write_errors(path):
                _move_into_place(temporary, path, replace)
        except OSError as error:
            raise OSError(f"{error}; all that was to be written there lies in {temporary}") from error


def _new_folder_for(path: Path) -> Path:
    """An empty folder beside ``path``; inside it where that is a mount point, or beside it nothing may be written."""
    beside = hidden_sibling(path)
    _delete(beside)
    if not path.exists():
        beside.mkdir()
        return beside
    inside = path / f"{OWN_PREFIX}tmp"
    _delete(inside)
    inside.mkdir()
    try:
        os.rename(inside, beside)
    except OSError:
        return inside
    return beside


def _move_into_place(temporary: Path, path: Path, replace: bool) -> None:
    try:
        os.rename(temporary, path)  # at once, also over an empty folder
    except OSError:
        if not path.is_dir() or not (replace or is_empty(path)):
            raise
        _exchange_contents(temporary, path)


def _exchange_contents(new: Path, path: Path) -> None:
    """Give ``path`` the contents of ``new``, and delete both ``new`` and what was there; on an error, undo it."""
    old = Path(tempfile.mkdtemp(prefix=f"{OWN_PREFIX}old.", dir=path))
    moves = [(entry, old / entry.name) for entry in path.iterdir() if not entry.name.startswith(OWN_PREFIX)]
    moves += [(entry, path / entry.name) for entry in sorted(new.iterdir())]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.rename(target, source)
        old.rmdir()
        raise
    _delete(old)
    _delete(new)


def stand_in(path: Path, is_text: bool = False) -> str:
    """What lies in place of a file that cannot be read: ``": it is ..."``, or nothing where that is not known.

    Args:
        path: of a file.
        is_text: whether it should be text; where it should not, any text is a stand-in, such as a server's message.
    """
    with path.open("rb") as file:
        start = file.read(200).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    line = start.partition("\n")[0].rstrip("\r")
    if start.startswith("version https://git-lfs"):
        return f": it is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent}"
    if not start:
        return ": it is empty: get it again"
    if start.startswith("<"):
        return f": it is a web page or a server's message, not the file itself, and begins with {line!r}: get it again"
    return "" if is_text or not line.isprintable() or "\ufffd" in line else f": it is text, {line!r}: get it again"


def read_json(path: Path, encodings: Sequence[str] = ("utf-8",)) -> Any:
    """The content of a file, in the first of these encodings that it can be in, with or without a byte order mark.

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
            return json.loads(data.decode(encoding).removeprefix("\ufeff"), object_pairs_hook=distinct_keys)
        except UnicodeDecodeError as error:
            reason = str(error)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}{stand_in(path, is_text=True)}") from error
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


def whole_number(mapping: Any, key: str, where: str) -> int:
    """``mapping[key]`` as an int from 0; the file may have it as a number or as text."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{where}: expected a whole number under {key!r}, found {value!r}")
    return int(str(value))


def cache_folder() -> Path | None:
    """Where things lie that are made again if they are gone: ``$XDG_CACHE_HOME/glus``, by default ``~/.cache/glus``;
    None for a user without a home, as containers have them."""
    caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if caches.startswith("~") else Path(caches) / "glus"
