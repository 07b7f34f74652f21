"""Work shared by processes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
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
    # The processes are the parallelism: OpenCV starts no threads in them.
    with ProcessPoolExecutor(num_workers, context, cv2.setNumThreads, (0,)) as pool:
        try:
            yield from pool.map(partial(_run, pickle.dumps(open_worker)), items)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died, probably killed for want of memory: run again with fewer num_workers"
            ) from error


def _run(pickled: bytes, item: Any) -> Any:
    """What the process's worker, opened with its first item, makes of this one; so its errors reach the user."""
    return _open(pickled)(item)


@cache
def _open(pickled: bytes) -> Callable[[Any], Any]:
    open_worker: Callable[[], Callable[[Any], Any]] = pickle.loads(pickled)
    return open_worker()
