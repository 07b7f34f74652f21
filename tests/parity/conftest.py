"""A recorded folder of a tiny model, and copies of it to break."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from tests.conftest import SAM2_OVERRIDES
from tests.parity.recorder import record
from tools.parity.comparison import Row


def not_passed(rows: dict[str, Row]) -> dict[str, str]:
    """Quantity -> status of those rows that did not pass."""
    return {quantity: row.status for quantity, row in rows.items() if row.status != "pass"}


@pytest.fixture(scope="session")
def recorded(tiny_model: LoadedModel, merged_glus: Glus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded with our own model, other sizes than the authors' fixtures; not to be changed."""
    config = copy.deepcopy(tiny_model.config)
    config.model.llm.lora_rank = 0
    folder = tmp_path_factory.mktemp("parity") / "recorded"
    record(folder, replace(tiny_model, glus=copy.deepcopy(merged_glus), config=config), SAM2_OVERRIDES)
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(recorded, tmp_path / "recorded")
