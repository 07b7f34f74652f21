"""Compare predictions with answers that ignore the sentence: has the model learned language?

    python scripts/compare.py dataset=shapes_valid output=outputs/summary.json \\
        'predictions={quickstart: outputs/quickstart/predictions, shipped: outputs/shipped/predictions}'

Prints a table per model and writes the summary in percent, with the scores of every expression as CSV beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from glus.config import CompareConfig, load_config
from glus.evaluation.baselines import compare_predictions, print_comparison, rows_as_csv, summary
from glus.files import write_text


@hydra.main(version_base="1.3", config_path="../configs", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``CompareConfig``."""
    try:
        config = load_config(CompareConfig, cfg)
        comparisons = compare_predictions(config.dataset, config.predictions, config.num_workers, config.max_videos)
        output = Path(config.output)
        write_text(output, json.dumps(summary(comparisons), indent=2, allow_nan=False) + "\n")
        write_text(output.with_suffix(".csv"), rows_as_csv(comparisons))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for label, comparison in comparisons.items():
        print_comparison(label, comparison, Console())
    print(f"{output}\n{output.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
