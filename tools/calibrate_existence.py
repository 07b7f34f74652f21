"""Choose the threshold below which masks are emptied, on a training split that was predicted without one.

    python scripts/predict.py dataset=shapes_train weights=outputs/shapes output=outputs/shapes/train format=rle
    python tools/calibrate_existence.py dataset=shapes_train predictions=outputs/shapes/train

Probability of [SEG] and object score are stored with every mask, and a threshold only empties masks, so J&F, N-acc and
T-acc of every threshold follow from these predictions exactly. Prints them for some, and the one of highest Final, for
``inference.existence_threshold`` and ``score.py existence_threshold``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from glus.config import CalibrateConfig
from glus.config.jobs import Jobs
from glus.evaluation.report import percents, print_rows
from glus.evaluation.score import Decision, calibrate
from glus.files import write_text

SHOWN = [0.0, *np.linspace(0.1, 0.9, 9).round(1).tolist()]
"""Thresholds of the table, besides the best."""


def choose_threshold(config: CalibrateConfig) -> None:
    """Choose, write and print.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``calibrate``; or the file cannot be written.
    """
    thresholds = calibrate(config.dataset, config.predictions, config.num_workers, config.max_videos)
    best, output = thresholds.best, Path(config.output)
    decisions = sorted([*thresholds.at(SHOWN), best], key=lambda decision: decision.threshold)
    content = {"best": _as_json(best), "decisions": [_as_json(decision) for decision in decisions]}
    write_text(output, json.dumps(content, indent=2, allow_nan=False) + "\n")
    rows = {f"{decision.threshold:.6g}": percents(decision.row()) for decision in decisions}
    print_rows(Console(), f"{config.dataset.name} ({config.dataset.split}), percent", "threshold", rows)
    print(f"highest Final: inference.existence_threshold={best.threshold:.6g}\n{output}")


def _as_json(decision: Decision) -> dict[str, float | None]:
    values = {**asdict(decision), "final": decision.final}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


if __name__ == "__main__":
    Jobs("calibrate_existence", CalibrateConfig, "output", is_file=True).start(choose_threshold)
