"""How long each stage of prediction takes, without making the device wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time until the block is left counts as ``name``, one of ``STAGES``."""
        if self._device.type == "cuda" and name != "decode":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def add_to(self, totals: dict[str, float]) -> None:
        """Add the seconds of each stage to ``totals``; on a GPU this waits for it."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        for name, seconds in self._seconds.items():
            totals[name] += seconds
        self._seconds.clear()
