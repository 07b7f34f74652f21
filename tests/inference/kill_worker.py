"""One process of a prediction that test_kill.py kills."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from glus.config import PredictConfig
from glus.inference import predictor  # noqa: F401 (the server that forks the processes has imported it already)


def predict(config: PredictConfig, rank: int, world_size: int) -> None:
    """What ``srun python scripts/predict.py`` does in its process ``rank``."""
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world_size)}
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "predict.py"))["predict"](config)
