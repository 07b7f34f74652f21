"""Score predictions against the ground truth of a split.

    python scripts/score.py dataset=shapes_valid predictions=outputs/quickstart/predictions

Predictions are ``<video>/<exp_id>/<frame>.png`` or ``<video>.jsonl`` (run-length codes). Prints the benchmark's tables
and writes report.json and per_expression.csv beside the predictions (or to ``output``). Exit status 1 if any prediction
was missing or unusable, or a video of the dataset could not be read. Needs no GPU.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from glus.config import ScoreConfig
from glus.config.jobs import Jobs
from glus.console import tables
from glus.evaluation.report import print_report, write_report
from glus.evaluation.score import score_predictions


def score(config: ScoreConfig) -> int:
    """Score, write and print.

    Returns:
        The exit status: 1 if any prediction was missing or unusable, or a video of the dataset could not be read.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``score_predictions``; or the report cannot be written.
    """
    report = score_predictions(
        config.dataset,
        config.predictions,
        config.missing,
        config.num_workers,
        config.max_videos,
        config.existence_threshold,
    )
    assert config.output is not None, "ScoreConfig sees to it"
    files = write_report(report, Path(config.output))
    print_report(report, tables())
    print(*files, sep="\n")
    return int(bool(report.problems or report.unscorable))


_JOBS = Jobs("score", ScoreConfig, "output")


@hydra.main(version_base="1.3", config_path="../configs", config_name="score")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``ScoreConfig``."""
    _JOBS.take(cfg)


if __name__ == "__main__":
    _JOBS.run(main, score)
