"""Records of a run that is interrupted, and what W&B may do to it."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import wandb  # noqa: TID251  # only to take its place

from glus import __version__
from glus.config import TrainConfig, WandbConfig
from glus.log import MetricsLog, run_info, write_run_folder


def test_records_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, WandbConfig(), is_main=True)
    for step in (1, 2, 3):
        log.write(step, {"total": step / 3})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tot')
    log = MetricsLog(tmp_path, WandbConfig(), is_main=True, start=2)
    log.write(3, {"total": 1.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "total": 1 / 3}, {"step": 2, "total": 2 / 3}, {"step": 3, "total": 1.0}]


def test_run_info_keeps_its_beginning_and_lists_each_continuation(tmp_path: Path) -> None:
    for start in (0, 4, 8):
        write_run_folder(tmp_path, TrainConfig(), start)
    content = json.loads((tmp_path / "run.json").read_text())
    assert [entry["step"] for entry in content["resumed"]] == [4, 8]
    assert "step" not in content
    write_run_folder(tmp_path, TrainConfig(), 0)
    assert "resumed" not in json.loads((tmp_path / "run.json").read_text())


def test_a_run_is_described_without_git_and_where_pip_knows_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unknown" not in run_info()["commit"]
    monkeypatch.setenv("PATH", str(tmp_path))

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    about = run_info()
    assert about["commit"].startswith("unknown")
    assert (about["versions"].pop("glus"), {*about["versions"].values()}) == (__version__, {"not installed"})


class FakeRun:
    """A W&B run that takes records until its connection breaks."""

    def __init__(self, breaks_at: int):
        self.breaks_at = breaks_at
        self.steps: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.breaks_at:
            raise OSError("no route to host")
        self.steps.append(step)

    def finish(self) -> None:
        pass


def test_an_interrupted_run_is_one_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[dict[str, Any]] = []
    run = FakeRun(breaks_at=4)
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or run)
    for first in (1, 3):
        log = MetricsLog(tmp_path, WandbConfig(enabled=True), is_main=True, start=first - 1)
        with caplog.at_level(logging.WARNING):
            for step in (first, first + 1):
                log.write(step, {"total": 1.0})
        log.close()
    assert len({options["id"] for options in started}) == 1
    assert {options["resume"] for options in started} == {"allow"}
    assert run.steps == [1, 2, 3]
    assert "W&B no longer takes records (no route to host); training goes on" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
