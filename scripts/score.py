"""Score predictions against the ground truth of a split.

    python scripts/score.py dataset=shapes_valid predictions=outputs/quickstart/predictions

Predictions are ``<video>/<exp_id>/<frame>.png`` or ``<video>.jsonl`` (run-length codes). Prints the benchmark's tables
and writes report.json and per_expression.csv beside the predictions (or to ``output``). Exit status 1 if any prediction
was missing or unusable. Needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from glus.config import ScoreConfig, load_config
from glus.evaluation.report import print_report, write_report
from glus.evaluation.score import score_predictions


@hydra.main(version_base="1.3", config_path="../configs", config_name="score")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``ScoreConfig``."""
    try:
        config = load_config(ScoreConfig, cfg)
        report = score_predictions(
            config.dataset, config.predictions, config.missing, config.num_workers, config.max_videos
        )
        files = write_report(report, Path(config.output or config.predictions))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_report(report, Console())
    print(*files, sep="\n")
    if report.problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
