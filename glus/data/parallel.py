"""Speed on a CPU: loops that are compiled, work that is shared by processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2
import numba

Item = TypeVar("Item")
Result = TypeVar("Result")
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def map_in_processes(worker: Callable[[Item], Result], items: Sequence[Item], num_workers: int) -> Iterator[Result]:
    """Apply a worker to each item, in order, in ``num_workers`` processes or, for 1, in this one.

    Args:
        worker: must pickle if there are several processes; each gets a copy at its start.
        items: the work.
        num_workers: processes; they are started clean, not forked from this one and its threads.

    Raises:
        ChildProcessError: a process died (killed, out of memory) or could not start. Whatever the worker itself raises
            is passed on.
    """
    num_workers = min(num_workers, len(items))
    if num_workers <= 1:
        yield from map(worker, items)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", type(worker).__module__])
    with ProcessPoolExecutor(num_workers, context, _start, (worker,)) as pool:
        try:
            yield from pool.map(_run, items)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died: killed for want of memory (run again with fewer num_workers), or unable to "
                'start, as of a script that asks for processes outside of if __name__ == "__main__":'
            ) from error


_worker: Callable[[Any], Any] | None = None
"""A process's own; None in the main process."""


def _start(worker: Callable[[Any], Any]) -> None:
    global _worker
    _worker = worker
    cv2.setNumThreads(0)  # the processes are the parallelism


def _run(item: Any) -> Any:
    assert _worker is not None
    return _worker(item)


def njit(function: Kernel) -> Kernel:
    """``numba.njit`` that releases the interpreter's lock, and keeps code on disk where there is a place for it.

    numba takes ``NUMBA_CACHE_DIR``, the folder of the source, or the user's cache folder. Where none can be written (a
    read-only container or installation), it refuses to make the function; here it is compiled in every process anew.
    """
    try:
        kernel: Any = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba's "no locator available"
        kernel = numba.njit(nogil=True)(function)
    return kernel
