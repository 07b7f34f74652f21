"""Put scored runs side by side on one page: scores, differences, curves, settings, time, sentences and what was seen.

    python scripts/report.py dataset=shapes_valid "runs=[outputs/a/predictions, outputs/b/predictions]" output=a.html

The page is one file that needs no network. Differences come with a 95 % interval.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from glus.config import ReportConfig, load_config
from glus.evaluation.page import build_page
from glus.evaluation.runs import read_runs
from glus.files import write_text
from glus.models.glus import memory_frames


@hydra.main(version_base="1.3", config_path="../configs", config_name="report")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``ReportConfig``."""
    try:
        config = load_config(ReportConfig, cfg)
        page = build_page(config.dataset, read_runs(config.runs), memory_frames, config.num_sentences)
        write_text(Path(config.output), page)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(config.output)


if __name__ == "__main__":
    main()
