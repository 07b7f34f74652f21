"""The predictor's promises, on a random model."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from glus.config import FramesConfig, InferenceConfig, QuerySampling
from glus.data.tokenization import ConversationTokenizer
from glus.inference.predictor import VideoPredictor
from glus.models.build import LoadedModel
from glus.structures import FrameResult

TEXTS = ["the red circle", "The circle moving left to the far corner.", "all shapes"]
SIZE = (40, 56)


class ArrayVideo:
    """Random frames; counts how often each is read."""

    reads_in_parallel = True

    def __init__(self, num_frames: int, seed: int = 0):
        self.names = [str(index) for index in range(num_frames)]
        self.reads = [0] * num_frames
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (num_frames, 5, 7, 3), dtype=np.uint8)
        self._frames = coarse.repeat(8, axis=1).repeat(8, axis=2)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        self.reads[index] += 1
        return self._frames[index]


def answering(model: LoadedModel, seg: bool = True) -> LoadedModel:
    """The model, made to always answer with [SEG], or with something else."""
    glus = copy.deepcopy(model.glus)
    logits = glus.language.logits
    token = model.vocabulary.seg_id if seg else model.vocabulary.eos_id
    bias = torch.nn.functional.one_hot(torch.tensor(token), model.config.model.llm.vocab_size) * 1e4
    glus.language.logits = lambda states: logits(states) + bias
    return replace(model, glus=glus)


def predictor(model: LoadedModel, frames: FramesConfig, **inference: object) -> VideoPredictor:
    tokenizer = ConversationTokenizer(model.vocabulary, model.glus.tokens_per_frame)
    return VideoPredictor(model.glus, tokenizer, frames, InferenceConfig(**inference))


def run(model: LoadedModel, video: ArrayVideo, texts=TEXTS, order=None, frames=None, **inference) -> list[FrameResult]:
    return list(predictor(model, frames or FramesConfig(2, 2), **inference).segment(video, texts, order))


@pytest.fixture(scope="module")
def seg_model(tiny_model: LoadedModel) -> LoadedModel:
    return answering(tiny_model)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 3, 4, 1, 0], [3], [1, 1]])
def test_one_result_per_entry_of_order(seg_model, order):
    results = run(seg_model, ArrayVideo(5), order=order)
    assert [result.frame for result in results] == order
    for result in results:
        assert result.masks_RHW.shape == (len(TEXTS), *SIZE)
        assert result.masks_RHW.dtype == bool
        assert result.scores_R.shape == result.has_seg_R.shape == (len(TEXTS),)
        assert result.has_seg_R.all()
        np.testing.assert_allclose(result.scores_R, 1)


def test_default_order_is_forward_and_memory_makes_order_matter(seg_model):
    forward = run(seg_model, ArrayVideo(5))
    assert [result.frame for result in forward] == [0, 1, 2, 3, 4]
    backward = run(seg_model, ArrayVideo(5), order=[4, 3, 2, 1, 0])
    assert any((f.masks_RHW != b.masks_RHW).any() for f, b in zip(forward, backward[::-1], strict=True))


def test_sentences_get_the_same_masks_alone_and_together(seg_model):
    together = run(seg_model, ArrayVideo(6))
    for row, text in enumerate(TEXTS):
        for alone, all_of_them in zip(run(seg_model, ArrayVideo(6), [text]), together, strict=True):
            np.testing.assert_array_equal(alone.masks_RHW[0], all_of_them.masks_RHW[row])
            np.testing.assert_allclose(alone.scores_R[0], all_of_them.scores_R[row], rtol=1e-5)


def test_the_same_video_twice_gives_the_same_masks(seg_model):
    first, second = (run(seg_model, ArrayVideo(4)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.masks_RHW, b.masks_RHW)


@pytest.mark.parametrize(
    "frames",
    [
        FramesConfig(0, 2),
        FramesConfig(2, 1),
        FramesConfig(0, 1),
        FramesConfig(4, 8),
        FramesConfig(2, 3, QuerySampling.uniform),
    ],
)
def test_any_number_of_context_and_query_frames(seg_model, frames):
    video = ArrayVideo(7)
    assert len(run(seg_model, video, frames=frames)) == 7
    assert video.reads == [1] * 7, "every frame is decoded exactly once"


def test_a_video_of_one_frame(seg_model):
    (result,) = run(seg_model, ArrayVideo(1), frames=FramesConfig(4, 4))
    assert result.masks_RHW.shape == (len(TEXTS), *SIZE)


def test_without_seg_the_mask_is_empty_unless_forced(tiny_model):
    model = answering(tiny_model, seg=False)
    for result in run(model, ArrayVideo(3)):
        assert not result.has_seg_R.any()
        assert not result.masks_RHW.any()
        assert (result.scores_R < 0.5).all()
    forced = run(model, ArrayVideo(3), force_seg=True)
    assert not any(result.has_seg_R.any() for result in forced)
    for result, answered in zip(forced, run(answering(tiny_model), ArrayVideo(3)), strict=True):
        np.testing.assert_array_equal(result.masks_RHW, answered.masks_RHW)
    assert any(result.masks_RHW.any() for result in forced)


def test_a_sentence_without_seg_does_not_disturb_the_others(tiny_model):
    """Its memory has holes; the others' masks stay what they are alone."""
    model = answering(tiny_model)
    model.glus.seg_embeddings = silence_first_row(model)
    together = run(model, ArrayVideo(5))
    expected = run(answering(tiny_model), ArrayVideo(5), TEXTS[1:])
    for result, alone in zip(together, expected, strict=True):
        assert result.has_seg_R.tolist() == [False, True, True]
        assert not result.masks_RHW[0].any()
        np.testing.assert_array_equal(result.masks_RHW[1:], alone.masks_RHW)


def silence_first_row(model: LoadedModel):
    ask = model.glus.seg_embeddings

    def seg_embeddings(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, logits = ask(*args)
        logits[0, :, model.vocabulary.seg_id] -= 2e4
        return embeds, logits

    return seg_embeddings


def test_what_is_kept_does_not_grow_with_the_video(seg_model, monkeypatch):
    """Tokens of the context frames and the last two; pixels of context frames that are still to be segmented."""
    import glus.inference.predictor as module

    caches = []
    original = module._FrameCache
    monkeypatch.setattr(module, "_FrameCache", lambda *args: caches.append(original(*args)) or caches[-1])
    kept = []
    for _ in predictor(seg_model, FramesConfig(2, 3)).segment(ArrayVideo(60), TEXTS[:1]):
        kept.append((len(caches[0]._tokens), len(caches[0]._pixels)))
    assert kept[12] == (2 + 2, 2)
    assert kept[18] == kept[40] == (2 + 2, 1)
    assert kept[50] == kept[57] == (2 + 2, 0)


@pytest.mark.parametrize(("texts", "order"), [([], None), (TEXTS, [0, 5]), (TEXTS, [-1])])
def test_impossible_requests(seg_model, texts, order):
    with pytest.raises(ValueError, match=r"nothing to segment|order names frame"):
        run(seg_model, ArrayVideo(5), texts, order)


def test_bfloat16(tiny_model):
    model = replace(tiny_model, glus=copy.deepcopy(tiny_model.glus).bfloat16())
    for result in run(model, ArrayVideo(3), force_seg=True):
        assert result.scores_R.dtype == np.float32
        assert result.masks_RHW.dtype == bool


def test_the_model_returns_to_training(tiny_model):
    model = answering(tiny_model)
    model.glus.train()
    run(model, ArrayVideo(2))
    assert model.glus.training
    assert all(module.training for module in model.glus.modules())
