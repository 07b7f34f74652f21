"""A program of the full size, watched: seconds, exit status, and the most memory that counted."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.programs import ROOT, environment

GB = 10**9
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Stage:
    """What a program did."""

    name: str
    seconds: float
    peak_bytes: int
    """Anonymous memory: without the pages of mapped files, which the system can drop."""
    bound_bytes: float
    status: int
    output: str

    def check(self, status: int = 0) -> None:
        """Assert that it ended as it should, within its bound."""
        assert self.status == status, f"{self.name}: exit status {self.status}\n{self.output[-4000:]}"
        assert self.peak_bytes <= self.bound_bytes, (
            f"{self.name}: {self.peak_bytes / GB:.2f} GB, allowed {self.bound_bytes / GB:.2f}"
        )


def watch(
    name: str,
    bound_bytes: float,
    program: str,
    *arguments: object,
    folder: Path,
    kill_when: Callable[[], bool] = lambda: False,
) -> Stage:
    """Run ``python <program> <arguments>``.

    Args:
        name: of the stage.
        bound_bytes: anonymous memory allowed.
        program: path from the root.
        arguments: its words.
        folder: where it runs, and where ``<name>.log`` is written.
        kill_when: asked again and again; True kills it.
    """
    log = folder / f"{name}.log"
    words = [sys.executable, str(ROOT / program), *map(str, arguments)]
    # Some processors announce bfloat16 matrix units that they then do not have.
    env = environment(HF_HUB_OFFLINE="1", ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    started, peak = time.monotonic(), 0
    with log.open("w") as file, subprocess.Popen(words, cwd=folder, env=env, stdout=file, stderr=file) as process:
        try:
            while process.poll() is None:
                peak = max(peak, _anonymous_bytes(process.pid))
                if kill_when():
                    process.kill()
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return Stage(name, time.monotonic() - started, peak, bound_bytes, process.returncode, log.read_text())


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def table(stages: list[Stage]) -> str:
    """A line per stage."""
    lines = [f"{'stage':<28} {'seconds':>8} {'peak GB':>8} {'allowed':>8}"]
    lines += [f"{s.name:<28} {s.seconds:>8.0f} {s.peak_bytes / GB:>8.2f} {s.bound_bytes / GB:>8.2f}" for s in stages]
    return "\n".join(lines)
