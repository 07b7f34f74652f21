"""Batches and fresh models for the tests of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glus.batch import Batch, TrainSample
from glus.data.chat.llava import LlavaChat
from glus.data.dataset import collate
from glus.data.sampling import draw_turns
from glus.models.glus import Glus
from glus.models.pretrained import TRAINED_FILE, LoadedModel, write_model_config
from glus.models.weight_files import write_tensors
from glus.types import ObjectKey

TEXTS = ("the red circle", "the circle moving left", "all shapes")
BatchMaker = Callable[..., Batch]


def save_trained(folder: Path, model: LoadedModel, glus: Glus) -> None:
    """The model folder that a checkpoint is: only what is trained."""
    folder.mkdir()
    write_model_config(folder, model.config, model.vocabulary)
    tensors = {name: parameter for name, parameter in glus.named_parameters() if parameter.requires_grad}
    write_tensors(folder / TRAINED_FILE, tensors, {})


@pytest.fixture
def glus(tiny_model: LoadedModel) -> Glus:
    """A copy of the tiny model that a test may change, in evaluation mode."""
    return copy.deepcopy(tiny_model.glus)


@pytest.fixture(scope="session")
def make_batch(tiny_model: LoadedModel) -> BatchMaker:
    """``make_batch(rows=(2, 1), num_context=2, num_query=2)``: random videos, ``rows`` sentences each."""
    tokenizer = LlavaChat(tiny_model.vocabulary, tiny_model.glus.mllm.tokens_per_frame)
    side = tiny_model.glus.mllm.clip.image_size

    def sample(rng: np.random.Generator, video: int, rows: int, num_context: int, num_query: int) -> TrainSample:
        height, width = 40 + 8 * video, 56
        frames = rng.integers(0, 256, (num_query, height, width, 3), dtype=np.uint8)
        names = [f"shapes/v{video}/{row}" for row in range(rows)]
        return TrainSample(
            context_pixels=rng.integers(0, 256, (num_context, side, side, 3), dtype=np.uint8),
            query_pixels=rng.integers(0, 256, (num_query, side, side, 3), dtype=np.uint8),
            query_frames=frames,
            conversations=[
                tokenizer.train(draw_turns(TEXTS[row], num_query, rng), num_context, names[row]) for row in range(rows)
            ],
            target_masks=[rng.integers(0, 2, (num_query, height, width), dtype=np.uint8) for _ in range(rows)],
            object_keys=[
                [ObjectKey("shapes", f"v{video}", str(row), str(q), frozenset({video})) for q in range(num_query)]
                for row in range(rows)
            ],
            names=names,
        )

    def make(rows: tuple[int, ...] = (2, 1), num_context: int = 2, num_query: int = 2, seed: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        samples = [sample(rng, video, count, num_context, num_query) for video, count in enumerate(rows)]
        return collate(samples, tiny_model.vocabulary.pad_id)

    return make
