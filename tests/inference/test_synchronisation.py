"""Within a chunk of frames, prediction never waits for the GPU: nothing is read back, no list becomes a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from glus.config import FramesConfig
from glus.inference.predictor import VideoPredictor
from glus.models.pretrained import LoadedModel
from tests.inference.asking import TEXTS, ArrayVideo, answering_sometimes, predictor
from tests.waits import Waits


@pytest.fixture(scope="module")
def moody_model(tiny_model: LoadedModel) -> LoadedModel:
    """Rows with holes in their memories take every way through the code."""
    return answering_sometimes(tiny_model)


@pytest.fixture
def one(moody_model: LoadedModel) -> VideoPredictor:
    return predictor(moody_model, FramesConfig(2, 3), chunk_frames=4, token_budget=300, memory_stride=2)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Without arrays on their way to the device."""
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: unseen(from_numpy, array))
    return Waits()


def unseen(function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
    with _disable_current_modes():
        return function(*arguments)


@pytest.mark.parametrize("key_frames", [None, [6, 0, 9]], ids=str)
def test_segmenting(one, waits, key_frames):
    """Left are the answers, read once per chunk, and each frame's masks, which travel behind its successor."""
    with waits:
        results = list(one.segment(ArrayVideo(12), TEXTS, key_frames))
    assert 0 < sum(int(result.has_seg_R.sum()) for result in results) < 12 * len(TEXTS)
    assert not waits.found


def test_scoring_frames(one, waits):
    with waits:
        one.score_frames(ArrayVideo(12), TEXTS)
    assert not waits.found
