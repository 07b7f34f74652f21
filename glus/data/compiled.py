"""numba's compiler, also where no folder can be written that its code could be kept in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def njit(cache: bool = False, nogil: bool = False) -> Callable[[Kernel], Kernel]:
    """``numba.njit``, whose ``cache=True`` keeps code on disk only where there is a place for it.

    numba takes ``NUMBA_CACHE_DIR``, the folder of the source, or the user's cache folder. Where none can be written (a
    read-only container or installation), it refuses to make the function; here it is compiled in every process anew.

    Args:
        cache: keep the code for later processes.
        nogil: release the interpreter's lock.
    """

    def compiled(function: Kernel) -> Kernel:
        try:
            kernel: Any = numba.njit(cache=cache, nogil=nogil)(function)
        except RuntimeError:  # numba's "no locator available"
            kernel = numba.njit(nogil=nogil)(function)
        return kernel

    return compiled
