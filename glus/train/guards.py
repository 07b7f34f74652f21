"""What watches over a long run: signals, hangs, loss spikes, and the mixture that was really drawn."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType

from glus.batch import Batch

log = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Exit code of a run that a signal ended after saving (EX_TEMPFAIL: the same command goes on)."""
EXIT_HUNG = 76
"""Exit code of a rank that waited too long."""
SPIKE_WINDOW, SPIKE_MIN_STEPS = 50, 10
"""Steps in the running median of the loss, and how many it needs before it judges."""


class Preemption:
    """Notes SIGTERM and SIGUSR1 instead of dying of them, inside a ``with`` block of the main thread."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name = ""
        """Of the signal that came; empty if none did."""

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


class HangWatch:
    """Ends this rank if it takes too long, after printing what it was doing and the stack of every thread.

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


def spike(losses: Sequence[float], latest: float) -> float:
    """The loss relative to the median of those before it; 1 as long as these are few.

    Args:
        losses: of earlier steps.
        latest: of this step.
    """
    if len(losses) < SPIKE_MIN_STEPS:
        return 1.0
    median = statistics.median(losses)
    return latest / median if median > 0 else math.inf


def drawn_samples(batches: Sequence[Batch], names: Sequence[str]) -> dict[str, float]:
    """Number of samples (videos) of each dataset in micro-batches; ``names`` are all datasets of the mixture."""
    counts = dict.fromkeys(names, 0.0)
    for batch in batches:
        videos = batch.video_index.tolist()
        for video in set(videos):
            counts[batch.object_keys[videos.index(video)][0].dataset] += 1
    return counts


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Each count divided by their sum."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}
