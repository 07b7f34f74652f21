"""The programs of ``scripts/`` and ``tools/``, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    """This process's, so changed that another one imports this checkout, computes on one thread and prints 120 wide."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120", **variables}


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*command: object, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command and what it prints.

    Args:
        command: its words.
        folder: where it runs; None: here.
        variables: of its environment.
    """
    words, env = [str(word) for word in command], environment(**variables)
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def run_program(
    program: str, *arguments: object, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``python <program> <arguments>``; the program is a path from the root, such as scripts/score.py."""
    return run(sys.executable, ROOT / program, *arguments, folder=folder, **variables)


def load_script(name: str) -> ModuleType:
    """A program of ``scripts/`` as a module, to run it without the seconds that a new process takes to import."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
