"""How processes that never meet share the videos of a split: whoever locks a video's byte of a common file has it.

POSIX record locks belong to a process and die with it, also under ``kill -9`` or when its machine goes down, so there
are no stale claims to detect; they need no launcher, work between machines wherever the file system has them (local
disks, NFS), and let a run be continued, or joined while it is going on, by any number of processes. A share fixed in
advance would need none of this, but leaves fast processes idle and a continued run unbalanced.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GATE = 0
"""The byte that is locked for moments in which only one process may do something; video n has byte n + 1."""


class Claims:
    """The locks of one process on a common file.

    The process must not open the file anywhere else meanwhile: closing it would give up all of its locks.

    Args:
        path: created empty if need be; its contents are left to the caller.
        key: of the config, which names the folder, for messages.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, key: str):
        self.path, self._key = path, key
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in such a block."""
        self._lock(_GATE, wait=True)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, _GATE)

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Whether item ``number`` (from 0 on) is this process's; if so, nobody else's until the block ends."""
        is_mine = self._lock(1 + number, wait=False)
        try:
            yield is_mine
        finally:
            if is_mine:
                fcntl.lockf(self.file, fcntl.LOCK_UN, 1, 1 + number)

    def _lock(self, byte: int, wait: bool) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
            return False
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be locked ({error.strerror}), which is how processes share the videos; choose "
                f"{self._key} on a file system with POSIX locks (a local disk, NFS, Lustre mounted with flock)"
            ) from error
        return True
