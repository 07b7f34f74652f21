"""Records of a run that is interrupted, and what W&B may do to it."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb  # noqa: TID251  # only to take its place
from wandb.proto import wandb_internal_pb2  # noqa: TID251  # and to read what it wrote

import glus.log
from glus import __version__
from glus.config import RecipeConfig, TrainConfig, TrainerConfig, WandbConfig
from glus.console import bar, console
from glus.log import Example, MetricsLog, log_to_file, run_info, setup_logging, write_run_folder


def wandb_run(**options: Any) -> TrainConfig:
    return TrainConfig(trainer=TrainerConfig(steps=4, wandb=WandbConfig(**options)))


def test_records_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, TrainConfig(), is_main=True)
    for step in (1, 2, 3):
        log.write(step, {"total": step / 3})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tot')
    log = MetricsLog(tmp_path, TrainConfig(), is_main=True, start=2)
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
    known = {name: about["versions"].pop(name) for name in ("glus", "torch")}
    assert known == {"glus": __version__, "torch": torch.__version__}
    assert {*about["versions"].values()} == {"not installed"}


def test_an_installed_package_does_not_take_the_commit_of_the_project_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / ".venv" / "glus"
    package.mkdir(parents=True)
    for words in (["init"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", tmp_path, *words, "-q"], check=True)
    monkeypatch.setattr(glus.log, "__file__", str(package / "log.py"))
    assert run_info()["commit"].startswith("unknown")


class FakeRun:
    """A W&B run that takes records until its connection breaks."""

    def __init__(self, breaks_at: int):
        self.breaks_at = breaks_at
        self.steps: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.breaks_at:
            raise OSError("no route to host")
        self.steps.append(step)

    def define_metric(self, name: str, summary: str) -> None:
        pass

    def finish(self) -> None:
        pass


def test_an_interrupted_run_is_one_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[dict[str, Any]] = []
    run = FakeRun(breaks_at=4)
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or run)
    for first in (1, 3):
        log = MetricsLog(tmp_path, wandb_run(enabled=True), is_main=True, start=first - 1)
        with caplog.at_level(logging.WARNING):
            for step in (first, first + 1):
                log.write(step, {"total": 1.0})
        log.close()
    assert len({options["id"] for options in started}) == 1
    assert {options["resume"] for options in started} == {"allow"}
    assert run.steps == [1, 2, 3]
    assert "W&B no longer takes records (no route to host); training goes on" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_wandb_does_not_finish_is_done_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unfinished(FakeRun):
        def finish(self) -> None:
            raise TimeoutError("not everything was sent")

    run = Unfinished(breaks_at=9)
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    log = MetricsLog(tmp_path, wandb_run(enabled=True), is_main=True)
    log.write(1, {"total": 1.0})
    log.close()
    assert run.steps == [1]
    assert "W&B was not finished (not everything was sent); training goes on" in caplog.text


def test_a_job_after_one_that_failed_has_a_run_of_wandb_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sweep: W&B gives back a run that is not finished to whoever asks for another."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("failed", "next"):
        (tmp_path / name).mkdir()
        log = MetricsLog(tmp_path / name, wandb_run(enabled=True, mode="offline"), is_main=True)
        assert log._wandb is not None
        assert log._wandb.id == (tmp_path / name / "wandb_id").read_text()
    log.close()


def test_a_run_of_wandb_can_be_found_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B13. What an offline run would send: config, group, tags, notes, best values, a table with pictures, a movie."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # where pictures of tables wait to be sent
    config = wandb_run(enabled=True, mode="offline", group="shapes", tags=["a", "b"])
    config.recipe = RecipeConfig(row="GLUS-S", source="x", gpu_hours=1, gpu_hours_source="x")
    log = MetricsLog(tmp_path, config, is_main=True)
    picture = np.zeros((8, 8, 3), np.uint8)
    for step, score in ((1, 60.0), (2, 40.0)):
        log.write(step, {"total": 1 / step})
        log.show([Example("the cat", "motion", {"J": score, "F": score}, picture)], [picture] * 3)
        log.write(step, {"valid/J&F": score})
    log.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    media = sorted(path.suffix for path in (folder / "files" / "media").rglob("*.*"))
    assert media == [".json", ".json", ".mp4", ".mp4"]
    (table, _) = sorted((folder / "files" / "media").rglob("*.json"))
    assert json.loads(table.read_text())["columns"] == ["sentence", "kind", "J", "F", "picture"]
    (file,) = folder.glob("*.wandb")
    records: list[Any] = []
    for _ in range(600):  # another process writes them, also after finish()
        records = list(read_offline(file))
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.05)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_group, list(run.tags), run.notes) == ("shapes", ["a", "b"], "GLUS-S")
    settings = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert settings["trainer"]["steps"] == 4
    tables = [record.artifact.manifest.contents for record in records if record.HasField("artifact")]
    assert [len(files) for files in tables] == [2, 2]  # the picture, and the table itself
    assert all(Path(file.local_path).stat().st_size == file.size for files in tables for file in files)
    best = {metric.metric.name: metric.metric.summary for metric in records if metric.HasField("metric")}
    assert best["valid/J&F"].max
    assert best["total"].min


def read_offline(file: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + length > len(data):  # it is still being written
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its end
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: lines, by the few signs that bars are made with."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            row -= int(part[2:-1] or 1) if part.endswith("A") else 0
            lines[row] = "" if part == "\x1b[2K" else lines[row]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def test_log_lines_stand_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3: there is one console, which takes the bar away, writes the line, and draws the bar again."""
    before = logging.getLogger().handlers[:]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console.cache_clear()
    try:
        setup_logging()
        log_to_file(tmp_path)
        for number in bar(range(2), 2, "training"):
            console().print("", end="")
            logging.getLogger("glus").info("line :smile: [%d]", number)
        logging.getLogger("distutils").debug("gcc -Wsign-compare")
    finally:
        console.cache_clear()
        logging.basicConfig(handlers=before, force=True)
    assert "training" in terminal.getvalue()
    shown = [line for line in screen(terminal.getvalue()) if line]
    assert [re.sub(r"^[\d:]{8} ", "", line) for line in shown] == ["line :smile: [0]", "line :smile: [1]"]
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == ["INFO line :smile: [0]", "INFO line :smile: [1]"]
