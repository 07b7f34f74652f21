"""A line on stderr while weights are read that take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from glus import distributed

GB = 10**9
QUIET_BYTES = GB
"""Less is read in silence."""
SECONDS = {True: 0.5, False: 10.0}
"""Between two lines on a terminal, where one replaces the other, and in a file."""


class LoadProgress:
    """How much of some weights rank 0 has read: in place on a terminal, otherwise a line every ten seconds.

    Args:
        source: where they come from.
        num_tensors: how many will be read.
        num_bytes: of all of them, in the file.
        stream: default: stderr.
        clock: seconds.
    """

    def __init__(
        self,
        source: str | Path,
        num_tensors: int,
        num_bytes: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._source, self._num_tensors, self._num_bytes = source, num_tensors, num_bytes
        self._stream, self._clock = stream or sys.stderr, clock
        self._is_terminal = self._stream.isatty()
        self._started = self._shown = clock()
        self._tensors = self._bytes = 0

    def advance(self, num_bytes: int) -> None:
        """One more tensor is read."""
        self._tensors, self._bytes = self._tensors + 1, self._bytes + num_bytes
        is_last, now = self._tensors == self._num_tensors, self._clock()
        if (
            distributed.rank()
            or self._num_bytes < QUIET_BYTES
            or not (is_last or now - self._shown >= SECONDS[self._is_terminal])
        ):
            return
        self._shown = now
        text = (
            f"{self._source}: {self._bytes / GB:.1f} of {self._num_bytes / GB:.1f} GB, "
            f"{self._tensors:,} of {self._num_tensors:,} tensors, {now - self._started:.0f} s"
        )
        start, end = ("\r", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=self._stream, flush=True)
