"""Check a dataset on disk: its files, every frame and every mask.

    python tools/check_data.py dataset=mevis_valid_u
    python tools/check_data.py dataset=mevis_train 'against=[mevis_valid_u,revos_valid]' num_workers=16
    python tools/check_data.py dataset=revos_train alignment=true

Prints a table and the first problems of each kind, and writes all of them to ``output``. Exit status 1 if there are
errors; warnings alone leave it 0. Needs no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glus.config import CheckConfig, DatasetConfig, load_config
from glus.config.jobs import Jobs
from glus.console import bar, tables
from glus.data.check import CheckRow, DataReport, check_dataset
from glus.files import write_text

MAX_MESSAGES = 5
"""Problems of a kind that are printed; the JSON file has all."""


def check_split(config: CheckConfig, against: Sequence[DatasetConfig]) -> int:
    """Check, write and print.

    Args:
        config: of the check.
        against: what ``config.against`` names.

    Returns:
        The exit status: 1 if there are errors.

    Raises:
        FileNotFoundError, ValueError, OSError: as ``check_dataset``; or the report cannot be written.
    """
    show = partial(bar, text=config.dataset.name)
    report = check_dataset(config.dataset, against, config.alignment, config.num_workers, show)
    write_text(Path(config.output), json.dumps(report.as_json(), indent=2) + "\n")
    print_check(report, tables())
    print(Path(config.output))
    return int(report.num_errors > 0)


def take_beside_others(jobs: Jobs, cfg: DictConfig) -> None:
    """Take a job, with the splits that it names, which only Hydra can compose."""
    jobs.take(cfg, lambda config: [load_dataset(name) for name in config.against])


def load_dataset(name: str) -> DatasetConfig:
    """Another file of ``configs/dataset``, with the paths of this run."""
    paths = [override for override in HydraConfig.get().overrides.task if override.startswith("paths")]
    return load_config(CheckConfig, hydra.compose("check_data", [f"dataset={name}", *paths])).dataset


def print_check(report: DataReport, console: Console) -> None:
    """A row for every check, then the problems by kind."""
    dataset = report.dataset
    title = f"{dataset.name}: {dataset.layout.value} layout, split {dataset.split}, below {dataset.root}"
    table = Table("check", "examined", "result", title=escape(title), box=box.SIMPLE, title_justify="left")
    for check, row in report.rows.items():
        skipped = [f"[dim]not checked: {escape(row.skipped)}[/]"] if row.skipped else []
        table.add_row(check.value, escape(row.examined), ", ".join([*_counts(row), *skipped]) or "[green]ok[/]")
    console.print(table)
    for check, row in report.rows.items():
        for count, lines in _counts(row).items():
            console.print(f"{count} {check.value}")
            for line in lines[:MAX_MESSAGES]:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            if len(lines) > MAX_MESSAGES:
                console.print(f"  ... and {len(lines) - MAX_MESSAGES:,} more")


def _counts(row: CheckRow) -> dict[str, list[str]]:
    """Its errors and its warnings, where there are any, by how many there are."""
    kinds = (("red", "error", row.errors), ("yellow", "warning", row.warnings))
    return {
        f"[{colour}]{len(lines):,} {noun}{'' if len(lines) == 1 else 's'}[/]": lines
        for colour, noun, lines in kinds
        if lines
    }


if __name__ == "__main__":
    jobs = Jobs("check_data", CheckConfig, "output", is_file=True)
    jobs.start(check_split, take=partial(take_beside_others, jobs))
