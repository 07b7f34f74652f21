"""What is done about other people's defaults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREE_40_MB = """
import sys, torch
from pathlib import Path
from glus import compat
assert not sys.argv[1:] or compat.keep_freed_memory()
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024
before = resident()
activations = [torch.ones(25_000) for _ in range(400)]
del activations
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_stays_with_the_process() -> None:
    def kept_mb(*arguments: str) -> int:
        command = [sys.executable, "-c", FREE_40_MB, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert kept_mb() < 10
    assert kept_mb("keep") > 30
