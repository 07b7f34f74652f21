"""The authors' numbers (see PROVENANCE.md): what our classes make of their model, frames and masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glus.config import FuserGamma
from tools.check_parity import main
from tools.parity.batch import compare_batch, make_batch, read_videos
from tools.parity.fixture import Arrays, Fixture, read_fixture, read_records
from tools.parity.inference import CASES_FILE, compare_case, open_frames, run_case
from tools.parity.metrics import replay_metrics
from tools.parity.models import Models, replay_checkpoint
from tools.parity.preprocess import replay_preprocess
from tools.parity.report import Report, Status

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


@pytest.fixture(scope="module")
def models(fixture: Fixture) -> Models:
    return Models(fixture)


def assert_met(report: Report, absent: int = 0) -> None:
    short = [row for row in report.rows if row.status in (Status.failed, Status.error)]
    assert not short
    assert report.is_met
    assert report.counts[Status.absent] == absent


def test_checkpoint(fixture: Fixture, models: Models) -> None:
    report = Report(FOLDER)
    replay_checkpoint(report, fixture, models)
    assert_met(report, absent=1)


def test_pictures(fixture: Fixture, models: Models) -> None:
    report = Report(FOLDER)
    replay_preprocess(report, fixture, models)
    assert_met(report)
    assert len(report.rows) == 6


def test_metrics(fixture: Fixture) -> None:
    report = Report(FOLDER)
    replay_metrics(report, fixture)
    assert_met(report)
    assert [row.compared for row in report.rows] == [50, 50]


def test_a_pass_over_the_video(fixture: Fixture, models: Models) -> None:
    (entry,) = [e for e in read_records(FOLDER / "inference" / CASES_FILE) if e.values["case"] == SHORT_CASE]
    model = models.frozen(FuserGamma(entry.get("fuser_gamma", str)))
    arrays, report = Arrays(FOLDER / "inference" / f"{SHORT_CASE}.npz"), Report(FOLDER)
    steps = run_case(fixture, model, open_frames(fixture), entry, arrays, keep=0)
    compare_case(report.case(SHORT_CASE), fixture, model, entry, arrays, steps)
    assert_met(report)
    assert len(report.rows) == 12


def test_training_conversations(models: Models) -> None:
    folder, report = FOLDER / "training", Report(FOLDER)
    model, videos = models.frozen(FuserGamma.checkpoint), read_videos(folder)
    compare_batch(report.case("batch"), videos, make_batch(folder, videos, model), Arrays(folder / "batch.npz"), model)
    assert_met(report)
    assert len(report.rows) == 3


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
