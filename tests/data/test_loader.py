"""Loader processes that fail, die, hang, or have too little shared memory: the training process learns of it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from glus.batch import TrainSample
from glus.data import loader
from glus.data.dataset import collate
from glus.data.loader import Batches, build_loader
from tests.data.test_collate import sample


class Stub:
    """In the place of a mixture: does something before each sample."""

    def __init__(self, act: Callable[[int], object]):
        self.act = act

    def __getitem__(self, number: int) -> TrainSample:
        made = sample("a", [5], height=6)
        made.names = [self.act(number)]
        return made


class Unsendable:
    """What the thread fails at that sends a worker's batches, as it does where shared memory or open files run out."""

    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def batches(act: Callable[[int], object], num_workers: int = 2) -> Batches:
    return build_loader(Stub(act), ([number] for number in range(99)), num_workers, 0)


def test_what_a_worker_cannot_send_is_told() -> None:
    found = batches(lambda number: Unsendable() if number == 3 else "fine")
    message = r"a loader process has failed \(RuntimeError: unable to allocate shared memory.*docker run --shm-size=1g"
    with pytest.raises(ChildProcessError, match=message):
        list(found)


def test_a_worker_that_is_killed_is_told() -> None:
    """For want of memory; while it is waited for."""

    def act(number: int) -> None:
        if number == 2:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)

    found = batches(act, num_workers=1)
    with pytest.raises(ChildProcessError, match=r"a loader process has failed \(DataLoader worker \(pid"):
        list(found)


def test_a_thread_that_pins_and_has_ended_is_told() -> None:
    """Of which torch hears nothing while it waits with a limit."""
    found = batches(lambda number: time.sleep(3), num_workers=1)
    found._batches._pin_memory_thread = threading.Thread()  # not alive
    try:
        with pytest.raises(ChildProcessError, match="the thread that pins batches for the GPU has ended"):
            next(found)
    finally:
        del found._batches._pin_memory_thread


def test_an_error_of_a_worker_is_passed_on() -> None:
    def act(number: int) -> None:
        raise RuntimeError("DataLoader timed out, it says, but did not")

    with pytest.raises(RuntimeError, match=r"Caught RuntimeError in DataLoader worker process 0(?s:.*)but did not"):
        next(batches(act))


def test_a_worker_that_hangs_is_given_up_when_it_is_asked_for() -> None:
    found = batches(lambda number: time.sleep(600 if number else 0), num_workers=1)
    assert found.take(lambda: True) is not None
    asked = iter([False, True])
    assert found.take(lambda: next(asked)) is None
    assert found.take(lambda: True) is None, "it may be asked again"


def test_slow_samples_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.05)
    found = batches(lambda number: time.sleep(0.3), num_workers=1)
    assert next(found) is not None
    assert next(found) is not None


@pytest.mark.parametrize(("num_workers", "is_enough"), [(0, True), (1, True), (2, False)])
def test_shared_memory_must_hold_what_workers_keep_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_workers: int, is_enough: bool
) -> None:
    batch = collate([sample("a", [5], height=6)], 0)
    size = batch.num_bytes
    assert size > 6 * 7 * 3 * 4  # the frames and the mask alone
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
    found = batches(lambda number: "fine", num_workers)
    if is_enough:
        assert [next(found).names for _ in range(4)] == [["fine"]] * 4
    else:
        with pytest.raises(
            ValueError, match=r"MiB free; 2 loader processes need .*: docker run --shm-size=1g, or data.num"
        ):
            next(found)
