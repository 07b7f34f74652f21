"""A threshold on existence empties masks, and changes nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from glus.config import FramesConfig
from glus.models.pretrained import LoadedModel
from glus.types import FrameResult
from tests.inference.asking import TEXTS, ArrayVideo, answering_sometimes, predictor

NUM_FRAMES = 9


def run(model: LoadedModel, key_frames: list[int] | None = None, **inference: object) -> list[FrameResult]:
    return list(predictor(model, FramesConfig(2, 3), **inference).segment(ArrayVideo(NUM_FRAMES), TEXTS, key_frames))


@pytest.fixture(scope="module")
def moody(tiny_model: LoadedModel) -> LoadedModel:
    return answering_sometimes(tiny_model)


@pytest.mark.parametrize("key_frames", [None, [3, 0, 8]], ids=["from the first", "key frames"])
def test_masks_below_the_threshold_are_emptied_and_later_frames_remember_them(moody, key_frames):
    plain = run(moody, key_frames)
    existence = np.concatenate([result.existence_R for result in plain])
    threshold = float(np.median(existence[existence > 0]))
    decided = run(moody, key_frames, existence_threshold=threshold)
    for one, other in zip(plain, decided, strict=True):
        expected = np.where((one.existence_R < threshold)[:, None, None], False, one.masks_RHW)
        np.testing.assert_array_equal(other.masks_RHW, expected)
        np.testing.assert_array_equal(other.object_scores_R, one.object_scores_R)
    drawn = [sum(int(result.masks_RHW.any(axis=(1, 2)).sum()) for result in results) for results in (plain, decided)]
    assert 0 < drawn[1] < drawn[0]


def test_the_object_score_is_the_mask_decoders_and_0_without_seg(moody, monkeypatch):
    expected, decode = [], moody.glus.segmenter.decode

    def observed(*arguments):
        decoded = decode(*arguments)
        expected.extend(decoded.object_logits_N.sigmoid().tolist())
        return decoded

    monkeypatch.setattr(moody.glus.segmenter, "decode", observed)
    results = run(moody, chunk_frames=2)
    has_seg = np.concatenate([result.has_seg_R for result in results])
    scores = np.concatenate([result.object_scores_R for result in results])
    assert scores.dtype == np.float32
    assert 0 < has_seg.sum() < has_seg.size
    assert not scores[~has_seg].any()
    assert sorted(scores[has_seg].tolist()) == pytest.approx(sorted(expected))
    assert np.ptp(scores[has_seg]) > 0
