"""Put scored runs side by side on one page: scores, differences, curves, settings, time, sentences and what was seen.

    python scripts/report.py dataset=shapes_valid "runs=[outputs/shapes/predictions]" output=a.html

The page is one file that needs no network. Differences come with a 95 % interval.
"""

from __future__ import annotations

from pathlib import Path

from glus.config import ReportConfig
from glus.config.jobs import Jobs
from glus.evaluation.page import build_page
from glus.evaluation.runs import read_runs
from glus.files import write_text
from glus.models.glus import memory_frames


def report_runs(config: ReportConfig) -> None:
    """Write the page and print its path.

    Raises:
        FileNotFoundError: a run is not scored, or the dataset is not there.
        ValueError: runs are of different splits or of another than ``dataset``, or a prediction is missing.
    """
    page = build_page(config.dataset, read_runs(config.runs), memory_frames, config.num_sentences)
    write_text(Path(config.output), page)
    print(config.output)


if __name__ == "__main__":
    Jobs("report", ReportConfig, "output", is_file=True).start(report_runs)
