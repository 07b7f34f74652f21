"""How far a prediction job is: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from glus.types import Video

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
"""Where there is no terminal."""
SECONDS_BETWEEN_LOOKS = 5.0
"""At the folder, for what other processes have finished."""


class JobProgress:
    """Counts the masks of a job, also those of other processes, and this process's frames per second.

    Args:
        is_done: whether a video is.
        videos: the whole job.
        is_shown: False: count only.
    """

    def __init__(self, is_done: Callable[[Video], bool], videos: Sequence[Video], is_shown: bool):
        self._is_done = is_done
        self._pending = {video[0].video: video for video in videos if not is_done(video)}
        self._num_pending, self._total = len(self._pending), sum(map(_num_masks, self._pending.values()))
        self._last_look = time.perf_counter()
        self._finished = 0  # masks of finished videos, whoever predicted them
        self._current = 0  # masks of the video at work
        self._frames = 0.0
        self._start = self._last_line = time.perf_counter()
        console = Console(stderr=True)
        self._is_logged = is_shown and not console.is_terminal
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), console=console, disable=not is_shown or self._is_logged
        )
        self._task = self._bar.add_task("", total=self._total)

    def __enter__(self) -> JobProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, masks: int, of_masks: int) -> None:
        """``masks`` more of the ``of_masks`` that this frame has."""
        self._current += masks
        self._frames += masks / of_masks
        self._show()

    def finish(self, video: Video) -> None:
        """A video is done; now and then, see what others have done meanwhile."""
        del self._pending[video[0].video]
        now = time.perf_counter()
        if now - self._last_look > SECONDS_BETWEEN_LOOKS:
            self._last_look = now
            self._pending = {name: other for name, other in self._pending.items() if not self._is_done(other)}
        self._finished, self._current = self._total - sum(map(_num_masks, self._pending.values())), 0
        self._show(is_due=not self._pending)

    def line(self) -> str:
        """``3/50 videos, 120/9000 masks, 2.1 frames/s, 0:12:30 left``; the time left counts on all processes."""
        elapsed = time.perf_counter() - self._start
        masks = self._finished + self._current
        left = elapsed * (self._total - masks) / max(masks, 1)
        return (
            f"{self._num_pending - len(self._pending)}/{self._num_pending} videos, {masks}/{self._total} masks, "
            f"{self._frames / max(elapsed, 1e-9):.1f} frames/s, {_clock(left)} left"
        )

    def _show(self, is_due: bool = False) -> None:
        self._bar.update(self._task, completed=self._finished + self._current, description=self.line())
        now = time.perf_counter()
        if self._is_logged and (is_due or now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            log.info("%s", self.line())


def _num_masks(video: Video) -> int:
    return len(video) * len(video[0].frames)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
