"""Score predictions against the ground truth of a split.

    python scripts/score.py dataset=shapes_valid predictions=outputs/shapes/predictions

Predictions are ``<video>/<exp_id>/<frame>.png`` or ``<video>.jsonl`` (run-length codes). Prints the benchmark's tables
and writes report.json and per_expression.csv beside the predictions (or to ``output``). ``dataset=[a,b]`` scores
``<predictions>/a`` and ``<predictions>/b``. Exit status 1 if any prediction was missing or unusable, or a video or
sentence of the dataset could not be read. Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from glus.config import ScoreConfig
from glus.config.jobs import Jobs
from glus.console import tables
from glus.evaluation.report import print_report, print_rows, write_report
from glus.evaluation.score import score_predictions
from glus.files import read_object


def score(config: ScoreConfig) -> int:
    """Score, write and print.

    Returns:
        The exit status: 1 if any prediction was missing or unusable, or a part of the dataset could not be read.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``score_predictions``; or the report cannot be written.
    """
    how = (config.missing, config.num_workers, config.max_videos, config.existence_threshold)
    report = score_predictions(config.dataset, config.predictions, *how)
    assert config.output is not None, "ScoreConfig sees to it"
    files = write_report(report, Path(config.output))
    print_report(report, tables())
    print(*files, sep="\n")
    return int(bool(report.problems or report.unscorable))


def print_scored(configs: dict[str, ScoreConfig], finished: Collection[str]) -> None:
    """A line for each of several splits."""
    rows = {}
    for name, config in configs.items():
        if name not in finished:
            cells = dict.fromkeys(("videos", "sentences", "J", "F", "J&F", "missing or unusable", "unscorable"), "-")
            rows[name] = {**cells, "missing or unusable": "not scored"}
            continue
        report = read_object(Path(config.output or "") / "report.json")
        mean = report["mean_over_sentences"]
        scores = {"J": mean["j"], "F": mean["f"], "J&F": mean["jf"]}
        rows[name] = {
            "videos": f"{report['num_videos']} of {report['num_videos_of_split']}",
            "sentences": str(mean["num_expressions"]),
            **{key: "-" if value is None else f"{value:.2f}" for key, value in scores.items()},
            "missing or unusable": str(len(report["problems"])),
            "unscorable": str(len(report["unscorable"])),
        }
    print_rows(tables(), "mean over sentences, percent", "dataset", rows)


if __name__ == "__main__":
    Jobs("score", ScoreConfig, "output", reads="predictions").start(score, print_scored)
