"""Compare scored runs with each other, or predictions with answers that ignore the sentence.

    python scripts/compare.py 'runs=[outputs/shapes/predictions, outputs/shapes/refined]'
    python scripts/compare.py dataset=shapes_valid 'predictions={a: outputs/shapes/predictions}' output=a.json

The first prints a table of what ``score.py`` left, models as columns, and the sentences that changed most. The second
asks whether a model has learned language: it prints a table per model and writes the summary in percent, with the
scores of every expression as CSV beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from glus.config import CompareConfig
from glus.config.jobs import Jobs
from glus.console import tables
from glus.evaluation.baselines import compare_predictions, print_comparison, rows_as_csv, summary
from glus.evaluation.runs import print_runs, read_runs
from glus.files import write_text


def write_comparison(config: CompareConfig) -> None:
    """Compare and print; of predictions, write the summary.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``read_runs`` and ``compare_predictions``; or the summary cannot be
            written, or has the name of the CSV file.
    """
    if config.runs:
        print_runs(tables(), read_runs(config.runs), config.num_sentences)
        return
    assert config.predictions is not None, "CompareConfig sees to it"
    assert config.output is not None
    output, scores = Path(config.output), Path(config.output).with_suffix(".csv")
    if output == scores:
        raise ValueError(f"output={output}: expected a JSON file; the scores of sentences go into a CSV file beside it")
    comparisons = compare_predictions(config.dataset, config.predictions, config.num_workers, config.max_videos)
    write_text(output, json.dumps(summary(comparisons), indent=2, allow_nan=False) + "\n")
    write_text(scores, rows_as_csv(comparisons))
    for label, comparison in comparisons.items():
        print_comparison(label, comparison, tables())
    print(f"{output}\n{scores}")


if __name__ == "__main__":
    Jobs("compare", CompareConfig, "output", is_file=True).start(write_comparison)
