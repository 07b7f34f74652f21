"""Check a dataset on disk: its files, every frame and every mask.

    python tools/check_data.py dataset=mevis_valid_u
    python tools/check_data.py dataset=mevis_train 'against=[mevis_valid_u,revos_valid]' num_workers=16
    python tools/check_data.py dataset=revos_train alignment=true

Prints a table and the first problems of each kind, and writes all of them to ``output``. Exit status 1 if there are
errors; warnings alone leave it 0. Needs no GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from glus.config import CheckConfig, DatasetConfig, load_config
from glus.data.check.findings import Report
from glus.data.check.report import print_report
from glus.data.check.split import check_dataset
from glus.files import write_text


@hydra.main(version_base="1.3", config_path="../configs", config_name="check_data")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``CheckConfig``."""
    try:
        config = load_config(CheckConfig, cfg)
        against = [load_dataset(name) for name in config.against]
        report = check_with_progress(config, against)
        output = Path(config.output)
        write_text(output, json.dumps(report.as_json(), indent=2) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_report(report, Console())
    print(output)
    if report.num_errors:
        sys.exit(1)


def load_dataset(name: str) -> DatasetConfig:
    """Another file of ``configs/dataset``, with the paths of this run."""
    paths = [override for override in HydraConfig.get().overrides.task if override.startswith("paths")]
    return load_config(CheckConfig, hydra.compose("check_data", [f"dataset={name}", *paths])).dataset


def check_with_progress(config: CheckConfig, against: list[DatasetConfig]) -> Report:
    """The check, with a bar on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(config.dataset.name, total=None)
        return check_dataset(
            config.dataset,
            against,
            config.alignment,
            config.num_workers,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


if __name__ == "__main__":
    main()
