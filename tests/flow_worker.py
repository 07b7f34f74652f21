"""Runs a program and prints, as JSON, which functions of the project's files one call of its heart enters.

python flow_worker.py <module> <function> <call> <program> <arguments of the program>
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = tuple(f"{ROOT / part}{os.sep}" for part in ("glus", "scripts", "tools"))


class Profiler:
    """Notes every function that is entered; comprehensions and lambdas belong to the one they stand in."""

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = defaultdict(set)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PARTS) and not code.co_name.startswith("<"):
            self.functions[Path(code.co_filename).relative_to(ROOT).as_posix()].add(code.co_name)


def followed(function: Callable[..., Any], call: int, profiler: Profiler) -> Callable[..., Any]:
    """The function, whose ``call``-th call is profiled; a generator is exhausted in it."""
    calls = 0

    def follow(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return function(*arguments, **options)
        sys.setprofile(profiler)
        try:
            result = function(*arguments, **options)
            return iter(list(result)) if hasattr(result, "__next__") else result
        finally:
            sys.setprofile(None)

    return follow


def main(module: str, function: str, call: str, program: str, *arguments: str) -> None:
    """Entry point."""
    sys.path.insert(0, str(ROOT))
    *path, name = function.split(".")
    owner: Any = importlib.import_module(module)
    for attribute in path:
        owner = getattr(owner, attribute)
    profiler = Profiler()
    setattr(owner, name, followed(getattr(owner, name), int(call), profiler))
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print(json.dumps({file: sorted(names) for file, names in profiler.functions.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
