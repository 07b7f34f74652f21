"""A tiny Shapes benchmark on disk, and a training config of the tiny model for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glus.config import (
    DataConfig,
    DatasetConfig,
    FramesConfig,
    InferenceConfig,
    Layout,
    MixtureItem,
    TrainConfig,
    TrainerConfig,
)
from glus.data.shapes_writer import write_shapes
from glus.tokens import Vocabulary
from tests.conftest import tiny_model_config


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two held-out videos of eight 64-pixel frames in the MeViS layout."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", num_videos=6, seed=0, num_frames=8, size=64)
    write_shapes(folder, "valid", num_videos=2, seed=0, num_frames=8, size=64)
    return folder


@pytest.fixture(scope="session")
def tiny_train_config(shapes_folder: Path, tiny_vocabulary: Vocabulary) -> Callable[..., TrainConfig]:
    """Makes a config of a three-step run; keyword arguments replace its top-level fields."""

    def make(**fields: object) -> TrainConfig:
        dataset = DatasetConfig("shapes_train", Layout.mevis, str(shapes_folder), "train", groups="kinds.json")
        config = TrainConfig(
            model=tiny_model_config(tiny_vocabulary.folder, tiny_vocabulary.size),
            frames=FramesConfig(num_context=2, num_query=2),
            data=DataConfig({"shapes": MixtureItem(dataset)}, expressions_per_video=2, num_workers=0),
            trainer=TrainerConfig(
                steps=3,
                global_batch_size=2,
                micro_batch_size=2,
                learning_rate=1e-3,
                warmup_steps=1,
                log_every=1,
                gradient_checkpointing=False,
            ),
            inference=InferenceConfig(trailing_space=False),
        )
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    return make
