"""Work shared by processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    open_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item], num_workers: int
) -> Iterator[Result]:
    """Apply a worker to each item, in order, in ``num_workers`` processes or, for 1, in this one.

    Args:
        open_worker: makes the worker, once per process; must pickle if there are several.
        items: the work.
        num_workers: processes; they are started clean, not forked from this one and its threads.

    Raises:
        ChildProcessError: a process died (killed, out of memory). Whatever the worker itself raises is passed on.
    """
    num_workers = min(num_workers, len(items))
    if num_workers <= 1:
        yield from map(open_worker(), items)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", getattr(open_worker, "func", open_worker).__module__])
    with ProcessPoolExecutor(num_workers, context, _start, (open_worker,)) as pool:
        try:
            yield from pool.map(_run, items)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died, probably killed for want of memory: run again with fewer num_workers"
            ) from error


_open_worker: Callable[[], Callable[[Any], Any]] | None = None
_worker: Callable[[Any], Any] | None = None
"""A process's own worker; None in the main process."""


def _start(open_worker: Callable[[], Callable[[Any], Any]]) -> None:
    global _open_worker
    _open_worker = open_worker
    cv2.setNumThreads(0)  # the processes are the parallelism


def _run(item: Any) -> Any:
    """Opens the worker with the first item, not at the start, so that its error reaches the user as it is."""
    global _worker
    assert _open_worker is not None
    if _worker is None:
        _worker = _open_worker()
    return _worker(item)
