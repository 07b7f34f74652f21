"""Scores of frames: what they are made of, what they cost, and that nothing else of the request changes them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from glus.config import FramesConfig
from glus.models.glus import IouHead
from glus.models.pretrained import LoadedModel
from tests.inference.asking import TEXTS, ArrayVideo, answering, predictor
from tools.benchmarks.plain import counted, segment_plainly, token_bound

NUM_FRAMES = 7
FRAMES = FramesConfig(2, 3)


@pytest.fixture(scope="module")
def head_model(tiny_model: LoadedModel) -> LoadedModel:
    """With an IoU head, at random."""
    model = answering(tiny_model)
    torch.manual_seed(0)
    model.glus.iou_head = IouHead(model.glus.mllm.width, model.glus.segmenter.width)
    return model


def score(model: LoadedModel, texts=TEXTS, num_frames=NUM_FRAMES, **inference) -> np.ndarray:
    return predictor(model, FRAMES, **inference).score_frames(ArrayVideo(num_frames), texts)


def test_without_a_head_it_is_the_probability_of_seg_times_the_stability_without_memory(tiny_model, monkeypatch):
    model = replace(tiny_model, glus=copy.deepcopy(tiny_model.glus))
    scores_ET = score(model, force_seg=True)
    stable, decode = [], model.glus.segmenter.decode

    def observed(*arguments):
        decoded = decode(*arguments)
        stable.append(decoded.stability_N.numpy())
        assert (decoded.logits_Nmm > 0).flatten(1).any(1).all()
        return decoded

    monkeypatch.setattr(model.glus.segmenter, "decode", observed)
    model.glus.memory_enabled = False
    results = list(predictor(model, FRAMES, force_seg=True).segment(ArrayVideo(NUM_FRAMES), TEXTS))
    expected_TE = np.stack([result.scores_R for result in results]) * np.stack(stable)
    assert (scores_ET.shape, scores_ET.dtype) == ((len(TEXTS), NUM_FRAMES), np.float32)
    np.testing.assert_allclose(scores_ET, expected_TE.T, rtol=1e-4)
    assert np.ptp(scores_ET) > 0


def test_with_a_head_it_is_what_the_head_expects(head_model):
    states = []
    handle = head_model.glus.seg_head.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    one = predictor(head_model, FRAMES)
    for text in TEXTS:
        list(segment_plainly(one, ArrayVideo(NUM_FRAMES), text, 0, 1))
    handle.remove()
    with torch.no_grad():
        expected = head_model.glus.iou_head(torch.cat(states)).sigmoid().view(len(TEXTS), NUM_FRAMES)
    np.testing.assert_allclose(score(head_model), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{"chunk_frames": 1, "token_budget": 1}, {"chunk_frames": 3}], ids=str)
@pytest.mark.parametrize("model", ["seg_model", "head_model"])
def test_chunks_batches_and_other_sentences_change_nothing(model, settings, request):
    model = request.getfixturevalue(model)
    scores_ET = score(model)
    np.testing.assert_allclose(score(model, **settings), scores_ET, atol=1e-4)
    np.testing.assert_allclose(score(model, TEXTS[1:2], **settings), scores_ET[1:2], atol=1e-4)


@pytest.mark.parametrize(("model", "sam2_images"), [("seg_model", 12), ("head_model", 0)])
def test_what_it_costs(model, sam2_images, request):
    """CLIP and the prompts once, as in prediction; with the head no SAM2 at all."""
    model = request.getfixturevalue(model)
    one = predictor(model, FRAMES, chunk_frames=5)
    with counted(model.glus) as counts:
        one.score_frames(ArrayVideo(12), TEXTS)
    assert counts["CLIP images"] == 12
    assert counts["SAM2 images"] == sam2_images
    assert counts["memory encoder calls"] == counts["memory attention calls"] == 0
    assert counts["LLM head tokens"] == 12 * len(TEXTS)
    assert counts["LLM tokens"] <= token_bound(one, TEXTS, 12)


def test_an_empty_mask_scores_nothing(tiny_model, head_model, monkeypatch):
    silent = answering(tiny_model, seg=False)
    assert not score(silent).any(), "no [SEG], no mask"
    silent.glus.iou_head = head_model.glus.iou_head
    assert not score(silent).any()
    assert score(silent, force_seg=True).all()

    model = answering(tiny_model)
    decode = model.glus.segmenter.decode

    def empty(*arguments):
        decoded = decode(*arguments)
        return replace(
            decoded,
            all_logits_N4mm=decoded.all_logits_N4mm * 0 - 9,
            stability_N=torch.ones_like(decoded.stability_N),
        )

    monkeypatch.setattr(model.glus.segmenter, "decode", empty)
    assert not score(model).any(), "no pixel, however stable"


def test_nothing_to_score(seg_model):
    with pytest.raises(ValueError, match="nothing to segment: 0 sentences, 7 frames"):
        score(seg_model, [])


def test_a_mask_that_is_not_finite_gets_no_score(tiny_model: LoadedModel) -> None:
    model = answering(tiny_model)
    with torch.no_grad():
        model.glus.segmenter.sam.sam_mask_decoder.output_hypernetworks_mlps[0].layers[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match=rf"frame number 0, sentence '{TEXTS[0]}': the segmenter's mask is not finite"):
        score(model)


def test_what_a_head_answers_that_is_not_finite_is_not_called_a_mask(head_model: LoadedModel) -> None:
    model = replace(head_model, glus=copy.deepcopy(head_model.glus))
    with torch.no_grad():
        model.glus.iou_head.fc2.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"number 0, sentence '{TEXTS[0]}': the IoU head's answer is not finite"):
        score(model)
