"""Frames read by threads ahead of the model, their way to its device and back, and the time of each stage."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from glus.data.frames import VideoSource


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array there; to a GPU through page-locked memory, from which it is copied while other work goes on."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # copies where it must
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(flags: torch.Tensor) -> torch.Tensor:
    """A bool tensor that will be complete on the CPU once the device has done what it was given to do until now."""
    if flags.device.type != "cuda":
        return flags
    return torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)


STAGES = ("decode", "clip", "llm", "sam2", "resize")
"""Waiting for frames; visual tokens; prompts; features, masks and memory; masks at the frames' size."""


class StageClock:
    """Adds up the time of stages: of the host on a CPU, of the device's own queue on a GPU.

    On a GPU a stage's work is marked by events in the queue, which are read at the end, so measuring costs no
    synchronisation; waiting for frames is measured on the host.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time until the block is left counts as ``name``; of prediction, one of ``STAGES``."""
        if self.device.type == "cuda" and name != "decode":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def add_to(self, totals: dict[str, float]) -> None:
        """Add the seconds of each stage to ``totals``; on a GPU this waits for it."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        for name, seconds in self._seconds.items():
            totals[name] += seconds
        self._seconds.clear()


MAX_THREADS = 4
MAX_AHEAD_BYTES = 256 * 2**20
"""Of decoded frames that wait: 10 of 4K, 41 of 1080p."""


@dataclass(frozen=True)
class Frame:
    """A decoded frame."""

    index: int
    pixels_HW3: np.ndarray
    """uint8 RGB."""
    prepared: np.ndarray | None
    """uint8: what the MLLM sees; None where its visual tokens are known already."""


class FrameStream:
    """Reads frames ahead, ``ahead`` of them or ``MAX_AHEAD_BYTES`` at most: memory does not grow with the video.

    Args:
        video: read from several threads if it allows that.
        schedule: (frame, whether the MLLM is to see it) in the order of ``take``.
        prepare: ``Mllm.prepare``.
        ahead: frames that are read before they are asked for.
    """

    def __init__(
        self,
        video: VideoSource,
        schedule: Iterable[tuple[int, bool]],
        prepare: Callable[[np.ndarray], np.ndarray],
        ahead: int,
    ):
        self._video = video
        self._schedule = iter(schedule)
        self._prepare = prepare
        threads = min(MAX_THREADS, os.cpu_count() or 1) if video.reads_in_parallel else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frames")
        self._coming: deque[Future[Frame]] = deque()
        self._ahead = ahead
        self._order_next()  # one, whose size tells how many more

    def take(self, index: int) -> Frame:
        """The next frame of the schedule, which must be ``index``.

        Raises:
            ValueError, FileNotFoundError: it cannot be read; the message names it.
        """
        frame = self._coming.popleft().result()
        room = max(1, MAX_AHEAD_BYTES // frame.pixels_HW3.nbytes)
        while len(self._coming) < min(self._ahead, room) and self._order_next():
            pass
        assert frame.index == index, f"frame {index} was asked for, but frame {frame.index} was scheduled"
        return frame

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _order_next(self) -> bool:
        """Whether there was another frame to order."""
        wanted = next(self._schedule, None)
        if wanted is not None:
            self._coming.append(self._pool.submit(self._read, *wanted))
        return wanted is not None

    def _read(self, index: int, is_seen: bool) -> Frame:
        pixels = self._video.read(index)
        return Frame(index, pixels, self._prepare(pixels) if is_seen else None)
