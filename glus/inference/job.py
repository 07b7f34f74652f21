"""A split as a job that processes share: a folder marked with what decides its contents, and videos claimed one by one.

Without a launcher, and continued or joined at any time, see ``claims``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from glus.files import naming_write_errors
from glus.inference.claims import Claims
from glus.inference.identity import Identity, differences
from glus.types import Video

log = logging.getLogger(__name__)


def open_job(mark: Path, what: str, identity: Identity, about: dict[str, Any]) -> Claims:
    """Begin a folder of results, or join or continue one that has the same identity.

    Args:
        mark: the file in it that holds the identity, and whose bytes processes lock.
        what: the results, in the plural, for messages.
        identity: everything that decides them.
        about: further information that is kept beside the identity (command, commit, versions).

    Raises:
        ValueError: the folder holds something else, or results of another identity.
        OSError: it cannot be written or locked.
    """
    if mark.parent.exists() and not mark.parent.is_dir():
        raise ValueError(f"output_dir={mark.parent} is a file; expected the name of a folder for {what}")
    with naming_write_errors(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        _check_is_ours(mark, what)
        claims = Claims(mark, "output_dir")
    with claims.alone():
        _check_or_write_identity(claims, what, identity, about)
    return claims


def process_videos(
    videos: Sequence[Video],
    claim: Callable[[int, Video], AbstractContextManager[bool]],
    process: Callable[[Video], None],
) -> list[str]:
    """Process what is neither done nor claimed by another process, the most expensive first, which balances the load.

    Args:
        videos: the whole job; every process must have the same.
        claim: whether the video of a number is to be processed here.
        process: does it.

    Returns:
        A line for each video that cannot be read; the others are processed nevertheless.
    """
    problems = []
    by_cost = sorted(enumerate(videos), key=lambda item: len(item[1]) * len(item[1][0].frames), reverse=True)
    for number, video in by_cost:
        with claim(number, video) as is_mine:
            if is_mine:
                try:
                    process(video)
                except (ValueError, FileNotFoundError) as error:
                    log.error("video %s: %s", video[0].video, error)
                    problems.append(f"{video[0].video}: {error}")
    return problems


def _check_is_ours(mark: Path, what: str) -> None:
    """Before ``mark`` is created; other processes create it before anything else."""
    entries = sorted(entry.name for entry in mark.parent.iterdir() if not entry.name.startswith("."))
    if entries and not mark.is_file():
        raise ValueError(
            f"output_dir={mark.parent} holds {entries[0]!r} but no {mark.name}, so it is no folder of {what} that "
            "could be continued; choose a new or empty folder"
        )


def _check_or_write_identity(claims: Claims, what: str, identity: Identity, about: dict[str, Any]) -> None:
    file = claims.file
    try:
        different = differences(json.load(file)["identity"], identity)
    except json.JSONDecodeError:  # new, or its writer was killed before it could write anything else
        file.seek(0)
        with naming_write_errors(claims.path):
            file.truncate()
            file.write(json.dumps({"identity": identity, **about}, indent=2) + "\n")
            file.flush()
        return
    if different:
        raise ValueError(
            f"output_dir={claims.path.parent} holds {what} made otherwise ({'; '.join(different)}); "
            "choose another output_dir, or delete this one to begin anew"
        )


def check_problems(problems: Sequence[str], done_to: str, num_videos: int, num_done: int) -> None:
    """Stop in the end if some videos could not be read.

    Args:
        problems: of ``process_videos``.
        done_to: what should have been done to them, for the message.
        num_videos: of the job.
        num_done: of these, by whichever process.

    Raises:
        ValueError: there are problems.
    """
    if problems:
        raise ValueError(
            f"{len(problems)} of {num_videos} videos could not be {done_to} ({num_done} are done); repair them and run "
            "the same command again:\n" + "\n".join(problems)
        )
