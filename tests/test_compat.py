"""What is done about other people's defaults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

from glus import compat

FREE_40_MB = """
import ctypes, sys
from pathlib import Path
from glus import compat
assert not sys.argv[1:] or compat.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024
before = resident_mb()
blocks = [libc.malloc(100_000) for _ in range(400)]
for block in blocks:
    libc.memset(block, 1, 100_000)
for block in blocks:
    libc.free(block)
print(resident_mb() - before)
"""


def test_freed_memory_stays_with_the_process() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not compat.keep_freed_memory()  # and nothing has changed
        return

    def kept_mb(*arguments: str) -> int:
        # glibc's own threshold, which it would raise by what importing has freed.
        env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
        command = [sys.executable, "-c", FREE_40_MB, *arguments]
        return int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)

    assert kept_mb() < 10
    assert kept_mb("keep") > 30
