"""What is done about other people's defaults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from glus import compat
assert not sys.argv[1:] or compat.keep_freed_memory()
def layer():
    activations = [torch.ones(25_000) for _ in range(400)]  # 40 MB
layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_not_taken_again_page_by_page() -> None:
    def page_faults(*arguments: str) -> int:
        command = [sys.executable, "-c", COUNT_FAULTS, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults("keep") < page_faults() / 10
