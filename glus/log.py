"""What a run tells: console, metrics.jsonl (always), Weights & Biases (when asked), and run information."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, cast

from glus import distributed
from glus.config import WandbConfig, to_yaml

_PACKAGES = ("glus", "torch", "transformers", "peft", "deepspeed", "sam2", "numpy")


def setup_logging() -> None:
    """Log to the console: rank 0 from INFO on, other ranks from WARNING on, with the rank in front."""
    is_main = distributed.rank() == 0
    prefix = "" if is_main else f"[rank {distributed.rank()}] "
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format=f"%(asctime)s {prefix}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("httpx", "DeepSpeed", "transformers", "numba"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def run_info() -> dict[str, Any]:
    """Command, commit, versions and time: what one needs to know about a run years later."""
    source = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": sys.argv,
        "commit": git.stdout.strip() or "unknown (not a git checkout)",
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "world_size": distributed.world_size(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def write_run_folder(folder: Path, config: object) -> None:
    """Create the run folder with the resolved ``config.yaml`` and ``run.json``; rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.json").write_text(json.dumps(run_info(), indent=2) + "\n")


class MetricsLog:
    """Scalars of a run by optimizer step: one JSON object a line, flushed at once; W&B beside it when asked.

    Args:
        folder: the run folder.
        wandb_config: whether and how to use Weights & Biases.
        is_main: only rank 0 writes.
    """

    def __init__(self, folder: Path, wandb_config: WandbConfig, is_main: bool):
        self._file = (folder / "metrics.jsonl").open("a") if is_main else None
        self._wandb = None
        if is_main and wandb_config.enabled:
            import wandb

            self._wandb = wandb.init(
                project=wandb_config.project,
                mode=cast('Literal["online", "offline"]', wandb_config.mode),  # checked by WandbConfig
                dir=str(folder),
                name=folder.name,
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of an optimizer step (counted from 1)."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Finish both files."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
