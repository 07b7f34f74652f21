"""The stages of ``tools/qualify.py``, each run in a process of its own, whose memory and whose crash are its own.

    python -m tools.qualification training outputs/qualify

A stage gives an ``Outcome``, or raises: ``Absent`` where the machine lacks what it needs, anything else where it
fails. What a stage alone needs it imports itself, so that a library that is missing fails that stage only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from glus import distributed
from glus.files import write_text
from tools.qualification.loading import full_size, loading
from tools.qualification.machine import environment, gpu_tests, synchronisation
from tools.qualification.outcome import Absent, Outcome, Sizes, code_digest, describe, installed_version
from tools.qualification.prediction import masks, prediction, quantisation
from tools.qualification.training import training

Stage = Callable[[Sizes, Path], Outcome]
STAGES: dict[str, Stage] = {
    "environment": environment,
    "gpu_tests": gpu_tests,
    "full_size": full_size,
    "loading": loading,
    "training": training,
    "prediction": prediction,
    "masks": masks,
    "synchronisation": synchronisation,
    "quantisation": quantisation,
}


def run_stage(name: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Run a stage and write ``<folder>/<name>.json``.

    Returns:
        What was written.
    """
    device = distributed.device()
    record: dict[str, Any] = {"stage": name, "machine": describe(device), "sizes": asdict(sizes)}
    record |= {"torch": torch.__version__, "transformers": installed_version("transformers"), "code": code_digest()}
    started = time.perf_counter()
    try:
        outcome = STAGES[name](sizes, folder)
    except Absent as reason:
        record |= {"verdict": "absent", "reason": str(reason)}
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("glus", "tools", "tests"):
            raise
        record |= {"verdict": "absent", "reason": f"{error.name} is not installed"}
    else:
        is_met = all(goal.is_met for goal in outcome.goals)
        record |= {"verdict": "PASS" if is_met else "FAIL", **asdict(outcome)}
    record["seconds"] = time.perf_counter() - started
    write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")
    return record
