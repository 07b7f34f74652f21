"""A tiny benchmark and a tiny model folder on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from glus.config import DatasetConfig, InferenceConfig, Layout, ModelFolderConfig
from glus.models.pretrained import LoadedModel, save_model
from glus.shapes.write import write_shapes
from tests.inference.asking import answering


def contents(folder: Path) -> dict[str, bytes]:
    """All that was predicted, byte for byte: masks and answers, without what says who did it and how fast."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".records" not in path.parts]
    about_the_run = {folder / "predict.json", folder / "cost.json"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path not in about_the_run}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    """Three videos of six 48-pixel frames."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, "valid", num_videos=3, num_frames=6, size=48)
    return DatasetConfig(name="shapes_valid", layout=Layout.mevis, root=str(root), split="valid", groups="kinds.json")


@pytest.fixture(scope="session")
def model_folder(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, exported; it draws masks though a random model does not answer with [SEG]."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    config = ModelFolderConfig(tiny_model.config.model, tiny_model.config.frames, InferenceConfig(force_seg=True))
    save_model(folder, tiny_model.glus.state_dict(), config, tiny_model.vocabulary, metadata={})
    return folder


@pytest.fixture(scope="module")
def seg_model(tiny_model: LoadedModel) -> LoadedModel:
    """The tiny model, made to always answer with [SEG]."""
    return answering(tiny_model)
