"""What watches over a long run: signals and hangs."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

log = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Exit code of a run that a signal ended after saving (EX_TEMPFAIL: the same command goes on)."""
EXIT_HUNG = 76
"""Exit code of a rank that waited too long."""


class Preemption:
    """Notes SIGTERM and SIGUSR1 instead of dying of them, inside a ``with`` block of the main thread."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        """Of the signal that came; empty if none did."""
        self.came_at = math.inf
        """When it came, by ``time.monotonic``."""

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.came_at = min(self.came_at, time.monotonic())


class HangWatch:
    """Ends this rank if it takes too long, after printing what it was doing and the stack of every thread.

    An error that leaves its ``with`` block is logged with the rank and what it was doing, which no traceback tells.

    A thread does so; where that cannot run because other code never releases the interpreter, faulthandler prints
    the stacks a little later.

    Args:
        timeout_minutes: for each ``start``.
        rank: of this process, for the message.
    """

    def __init__(self, timeout_minutes: float, rank: int):
        self._seconds = 60 * timeout_minutes
        self._rank = rank
        self._timer: threading.Timer | None = None
        self.doing = ""
        """What the message says this rank was doing; may change without a new start."""

    def __enter__(self) -> HangWatch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if isinstance(error, Exception):
            where = f"rank {self._rank} failed while {self.doing}"
            log.error("%s. The same command goes on from the newest checkpoint", where)

    def start(self, doing: str) -> None:
        """Begin anew: something was finished, and ``doing`` comes now."""
        self.stop()
        self.doing = doing
        self._timer = threading.Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(1.1 * self._seconds + 1, exit=True, file=sys.__stderr__ or 2)

    def stop(self) -> None:
        """Wait for nothing any more."""
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        print(
            f"error: rank {self._rank} hangs: nothing done for {self._seconds / 60:g} minutes "
            f"(trainer.hang_timeout_minutes); it was {self.doing}. Its threads:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        os._exit(EXIT_HUNG)
