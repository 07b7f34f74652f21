"""Files and folders that are there complete or not at all.

Everything is prepared under a hidden name beside its own and renamed in the end. An error deletes what was prepared; a
killed process leaves it, until the next attempt at the same name replaces it. Holds against a killed process, not
against a power cut: nothing is forced to disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        raise OSError(
            f"cannot write {error.filename or path}: {error.strerror} ({free:,.0f} MiB free below {place}); "
            "make room or choose another place, and run the same command again: what is finished is kept"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; two processes must not do so at once.

    Raises:
        OSError: it cannot be written; the message says where and how much room is left.
    """
    temporary = hidden_sibling(path)
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name ``path`` at the end, and is deleted on an error.

    Args:
        path: a new or empty folder; with ``overwrite`` also one that was made in the same way, which is replaced.
        overwrite: allow that.
        mark: name of a file that shows that a folder was made in the same way.

    Raises:
        ValueError: ``path`` is a file, or a folder that must not be replaced.
        OSError: it cannot be written.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; expected the name of a folder")
    if path.is_dir() and any(path.iterdir()):
        if not (path / mark).is_file():
            raise ValueError(
                f"output {path} holds files, and no {mark} of an earlier run; choose a new or empty folder"
            )
        if not overwrite:
            raise ValueError(f"output {path} holds the result of an earlier run; choose another, or add --overwrite")
    temporary = hidden_sibling(path)
    with naming_write_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with naming_write_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
