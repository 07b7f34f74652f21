"""The authors' numbers (see PROVENANCE.md): what our classes make of their model, frames and masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.check_parity import main
from tools.parity.comparison import Case, Row, count_rows, is_met, read_records
from tools.parity.network import Fixture, load_network, read_fixture
from tools.parity.recorded_batch import compare_batch, read_setup
from tools.parity.replay_inference import (
    CASES_FILE,
    open_frames,
    replay_case,
    replay_checkpoint,
    replay_metrics,
    replay_preprocess,
)

FOLDER = Path(__file__).parent / "recorded"
MAX_BYTES = 12_000_000
LEFT_OUT = {
    ("checkpoint", "SAM2's own file"),
    *(
        (f"probes of {case}", name)
        for case in ("bank_stride3_exp0",)
        for name in ("conditioned_64", "dense_position_64", "high_res_128", "image_feature_64")
    ),
    *(
        (case, "low-resolution logits")
        for case in (
            "bank_stride1_exp0",
            "bank_stride1_exp1",
            "bank_stride3_exp1",
            "keyframe_exp0_part0",
            "no_memory_exp1",
            "some_fail_exp0",
            "true_gamma_stride3_exp1",
        )
    ),
    *(("training step_contrastive", name) for name in ("[SEG] embedding", "low-resolution logits")),
}
"""What PROVENANCE.md says was left out."""
SHORT_CASE = "keyframe_exp0_part1"
"""Backward from the key frame: five steps."""


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return read_fixture(FOLDER)


@pytest.fixture
def rows() -> list[Row]:
    return []


def assert_met(rows: list[Row], absent: int = 0) -> None:
    assert not [row for row in rows if row.status in ("fail", "error")]
    assert is_met(rows)
    assert count_rows(rows)["absent"] == absent


def test_checkpoint(fixture: Fixture, rows: list[Row]) -> None:
    replay_checkpoint(rows, fixture)
    assert_met(rows, absent=1)


def test_pictures(fixture: Fixture, rows: list[Row]) -> None:
    replay_preprocess(rows, fixture)
    assert_met(rows)
    assert len(rows) == 6


def test_metrics(fixture: Fixture, rows: list[Row]) -> None:
    replay_metrics(rows, fixture)
    assert_met(rows)
    assert [row.compared for row in rows] == [50, 50]


def test_a_pass_over_the_video(fixture: Fixture, rows: list[Row]) -> None:
    (entry,) = [entry for entry in read_records(FOLDER / "inference" / CASES_FILE) if entry["case"] == SHORT_CASE]
    replay_case(Case(rows, SHORT_CASE), fixture, entry, open_frames(fixture))
    assert_met(rows)
    assert len(rows) == 13


def test_training_conversations(fixture: Fixture, rows: list[Row]) -> None:
    setup = read_setup(FOLDER / "training", load_network(fixture)[0])
    compare_batch(Case(rows, "batch"), setup)
    assert_met(rows)
    assert len(rows) == 3


@pytest.mark.slow
def test_everything(tmp_path: Path) -> None:
    """Every case, both training steps, and what the copy does not hold: minutes."""
    with pytest.raises(SystemExit) as stopped:
        main([str(FOLDER), "--json", str(tmp_path / "report.json")])
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert stopped.value.code == 0
    assert {(row["case"], row["quantity"]) for row in rows if row["status"] == "absent"} == LEFT_OUT


def test_the_copy_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= MAX_BYTES
