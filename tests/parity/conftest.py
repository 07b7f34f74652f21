"""A recorded folder of a tiny model, and copies of it to break."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glus.models.build import LoadedModel
from glus.models.language import merge_lora
from tests.conftest import SAM2_OVERRIDES
from tests.parity.recorder import record


@pytest.fixture(scope="session")
def recorded(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded with our own model, other sizes than the authors' fixtures; not to be changed."""
    config = copy.deepcopy(tiny_model.config)
    glus = copy.deepcopy(tiny_model.glus)
    merge_lora(glus.language.llama)
    config.model.llm.lora_rank = 0
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in glus.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("parity") / "recorded"
    record(folder, replace(tiny_model, glus=glus.eval(), config=config), SAM2_OVERRIDES)
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(recorded, tmp_path / "recorded")
