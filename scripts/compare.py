"""Compare predictions with answers that ignore the sentence: has the model learned language?

    python scripts/compare.py dataset=shapes_valid output=outputs/summary.json \\
        'predictions={quickstart: outputs/quickstart/predictions, shipped: outputs/shipped/predictions}'

Prints a table per model and writes the summary in percent, with the scores of every expression as CSV beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from glus.config import CompareConfig
from glus.config.jobs import Jobs
from glus.evaluation.baselines import compare_predictions, print_comparison, rows_as_csv, summary
from glus.files import write_text


def write_comparison(config: CompareConfig) -> None:
    """Compare, write and print.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``compare_predictions``; or the summary cannot be written.
    """
    comparisons = compare_predictions(config.dataset, config.predictions, config.num_workers, config.max_videos)
    output = Path(config.output)
    write_text(output, json.dumps(summary(comparisons), indent=2, allow_nan=False) + "\n")
    write_text(output.with_suffix(".csv"), rows_as_csv(comparisons))
    for label, comparison in comparisons.items():
        print_comparison(label, comparison, Console())
    print(f"{output}\n{output.with_suffix('.csv')}")


_JOBS = Jobs("compare", CompareConfig, "output", is_file=True)


@hydra.main(version_base="1.3", config_path="../configs", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``CompareConfig``."""
    _JOBS.take(cfg)


if __name__ == "__main__":
    _JOBS.run(main, write_comparison)
