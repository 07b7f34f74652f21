"""A whole folder, part by part."""

from __future__ import annotations

from pathlib import Path

from tools.parity.fixture import read_fixture
from tools.parity.inference import replay_inference
from tools.parity.metrics import replay_metrics
from tools.parity.models import Models, replay_checkpoint
from tools.parity.preprocess import replay_preprocess
from tools.parity.report import Report
from tools.parity.training import replay_training

PARTS = ("preprocess", "inference", "training", "metrics")
"""Folders of which at least one must be there."""


def replay(folder: Path) -> Report:
    """Replay everything that a folder holds.

    Args:
        folder: fixtures; the README beside them describes the format.

    Returns:
        One row for each quantity, also for what is missing or cannot be compared.

    Raises:
        FileNotFoundError, ValueError: ``fixture.json`` or SAM2's architecture cannot be read, or there is nothing to
            compare.
    """
    fixture = read_fixture(folder)
    if not any((folder / part).is_dir() for part in PARTS):
        raise FileNotFoundError(f"{folder} holds none of {', '.join(PARTS)}: there is nothing to compare")
    models, report = Models(fixture), Report(folder)
    replay_checkpoint(report, fixture, models)
    replay_preprocess(report, fixture, models)
    replay_inference(report, fixture, models)
    replay_training(report, fixture, models)
    replay_metrics(report, fixture)
    return report
