"""Records of a run that is interrupted, and what W&B may do to it."""

from __future__ import annotations

import json
from pathlib import Path

from glus.config import TrainConfig, WandbConfig
from glus.log import MetricsLog, write_run_folder


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
