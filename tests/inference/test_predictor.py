"""The predictor's promises, on a random model, against the plain procedure that shares nothing."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from glus.config import FramesConfig, Precision, QuerySampling, SettingsConfig, Window
from glus.data.frames import FrameStream
from glus.inference import video_run
from glus.inference.asking import Prompter
from glus.inference.predictor import load_predictor
from glus.inference.video_run import STAGES, VideoRun
from glus.models.glus import Glus, MemoryBank
from glus.models.pretrained import LoadedModel
from glus.types import FrameResult
from tests.inference.asking import SIZE, TEXTS, ArrayVideo, answering, answering_sometimes, predictor
from tools.benchmarks.plain import counted, segment_plainly, token_bound


def run(
    model: LoadedModel, video: ArrayVideo, texts=TEXTS, key_frames=None, frames=None, **inference
) -> list[FrameResult]:
    return list(predictor(model, frames or FramesConfig(2, 2), **inference).segment(video, texts, key_frames))


def by_row(results: list[FrameResult], num_rows: int, num_frames: int) -> np.ndarray:
    """(E, T, H, W) bool; every sentence must be answered once in every frame."""
    masks = np.zeros((num_rows, num_frames, *SIZE), bool)
    times = np.zeros((num_rows, num_frames), int)
    for result in results:
        masks[list(result.rows), result.frame] = result.masks_RHW
        times[list(result.rows), result.frame] += 1
    assert (times == 1).all()
    return masks


def plain_logits(model: LoadedModel, video: ArrayVideo, text: str, key_frame=0, frames=None, **inference) -> np.ndarray:
    """(T, H, W): up from the key frame, then down to frame 0, as the released key-frame script runs."""
    one = predictor(model, frames or FramesConfig(2, 2), **inference)
    up = [logits.numpy() for logits, _ in segment_plainly(one, video, text, key_frame, 1)]
    down = [logits.numpy() for logits, _ in segment_plainly(one, video, text, key_frame, -1)] if key_frame else up[:1]
    return np.stack([*down[::-1], *up[1:]])


def assert_same(masks_THW: np.ndarray, logits_THW: np.ndarray) -> None:
    """Equal wherever the plain logits are not within 1e-4 of the threshold."""
    far = np.abs(logits_THW) >= 1e-4
    np.testing.assert_array_equal(masks_THW[far], (logits_THW > 0)[far])
    assert far.mean() > 0.9


SETTINGS = {
    "published": {"frames": FramesConfig(4, 4), "memory_stride": 3},
    "clips": {"frames": FramesConfig(2, 3), "window": Window.clips},
    "clips without the space": {"frames": FramesConfig(2, 3), "window": Window.clips, "trailing_space": False},
    "no context, no space": {"frames": FramesConfig(0, 2), "trailing_space": False},
    "one query frame": {"frames": FramesConfig(2, 1)},
    "no context, one query frame": {"frames": FramesConfig(0, 1)},
    "window longer than the video": {"frames": FramesConfig(4, 12)},
    "spread query frames": {"frames": FramesConfig(2, 3, QuerySampling.uniform)},
    "tiny chunks and batches": {"chunk_frames": 1, "token_budget": 1},
    "odd chunks": {"frames": FramesConfig(2, 3), "chunk_frames": 3, "token_budget": 300},
    "one sentence at a time": {"frames": FramesConfig(2, 3), "memory_gb": 1e-9},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_masks_are_those_of_the_plain_procedure(seg_model, settings):
    video = ArrayVideo(9)
    masks_ETHW = by_row(run(seg_model, video, **settings), len(TEXTS), 9)
    assert video.reads == [1] * 9, "every frame is decoded exactly once"
    for text, masks_THW in zip(TEXTS, masks_ETHW, strict=True):
        assert_same(masks_THW, plain_logits(seg_model, video, text, **settings))


@pytest.mark.parametrize("settings", [{}, {"chunk_frames": 2, "memory_gb": 1e-9}, {"window": Window.clips}], ids=str)
def test_key_frames_start_two_passes_each(seg_model, settings):
    video, key_frames = ArrayVideo(7), [3, 0, 6]
    results = run(seg_model, video, key_frames=key_frames, memory_stride=2, **settings)
    assert all(result.rows and result.has_seg_R.dtype == bool for result in results)
    masks_ETHW = by_row(results, len(TEXTS), 7)
    for text, key_frame, masks_THW in zip(TEXTS, key_frames, masks_ETHW, strict=True):
        assert_same(masks_THW, plain_logits(seg_model, ArrayVideo(7), text, key_frame, memory_stride=2, **settings))
    assert max(video.reads) <= 2


def test_results_come_frame_by_frame(seg_model):
    results = run(seg_model, ArrayVideo(5))
    assert [result.frame for result in results] == [0, 1, 2, 3, 4]
    for result in results:
        assert result.rows == (0, 1, 2)
        assert result.masks_RHW.shape == (len(TEXTS), *SIZE)
        assert result.masks_RHW.dtype == bool
        assert result.scores_R.dtype == np.float32
        assert result.has_seg_R.all()
        np.testing.assert_allclose(result.scores_R, 1)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[:1] * 3, TEXTS], ids=["one", "thrice the same", "three"])
def test_exactly_what_is_needed_is_computed(seg_model, texts):
    """CLIP and SAM2 once per frame, the prefix once per video, logits only where [SEG] is to come."""
    num_frames, one = 12, predictor(seg_model, FramesConfig(3, 4), chunk_frames=5)
    with counted(seg_model.glus) as counts:
        list(one.segment(ArrayVideo(num_frames), texts))
    assert counts["CLIP images"] == counts["SAM2 images"] == num_frames
    assert counts["memory encoder calls"] == counts["memory attention calls"] == num_frames - 1
    assert counts["LLM head tokens"] == counts["LLM last MLP tokens"] == num_frames * len(texts)
    assert counts["LLM tokens"] <= token_bound(one, texts, num_frames)


@pytest.mark.parametrize(("rows", "groups"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (100, [3])])
def test_sentences_pass_sam2_in_groups_that_fit_the_memory(seg_model, rows, groups):
    """The same masks and memories in groups of any size, which the byte budget decides."""
    segmenter = seg_model.glus.segmenter
    taken, decode = [], segmenter.decode
    one = predictor(seg_model, FramesConfig(2, 2))
    room = rows * segmenter.step_bytes(seg_model.glus.memory_frames, SIZE)
    grouped = predictor(seg_model, FramesConfig(2, 2), memory_gb=room / 2**30)
    expected = list(one.segment(ArrayVideo(6), TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter, "decode", lambda *a: (taken.append(len(a[1])), decode(*a))[1])
        results = list(grouped.segment(ArrayVideo(6), TEXTS))
    assert taken == groups * 6
    for result, its_expected in zip(results, expected, strict=True):
        assert (result.frame, result.rows) == (its_expected.frame, its_expected.rows)
        np.testing.assert_array_equal(result.masks_RHW, its_expected.masks_RHW)
    np.testing.assert_array_equal(grouped.score_frames(ArrayVideo(6), TEXTS), one.score_frames(ArrayVideo(6), TEXTS))


def test_more_is_shared_than_the_prefix(seg_model):
    """The first query frame and the question's first words are read once for all sentences."""
    one = predictor(seg_model, FramesConfig(3, 4))
    spent = {}
    for count in (1, 2, 3):
        with counted(seg_model.glus) as counts:
            list(one.segment(ArrayVideo(12), [TEXTS[0]] * count))
        spent[count] = counts["LLM tokens"]
    assert spent[3] - spent[2] < spent[1] - len(one.chat.opening(3)) - 9 * seg_model.glus.mllm.tokens_per_frame


def test_clips_read_far_fewer_tokens(seg_model):
    spent = {}
    for window in Window:
        with counted(seg_model.glus) as counts:
            run(seg_model, ArrayVideo(16), frames=FramesConfig(2, 4), window=window)
        spent[window] = counts["LLM tokens"]
    assert spent[Window.clips] < 0.5 * spent[Window.sliding]


def test_key_frames_encode_no_frame_more_than_twice(seg_model):
    with counted(seg_model.glus) as counts:
        run(seg_model, ArrayVideo(10), key_frames=[4, 9, 0])
    assert counts["CLIP images"] == 10
    assert counts["SAM2 images"] <= 20


def test_the_same_video_twice_gives_the_same_masks_and_leaves_nothing(seg_model):
    one = predictor(seg_model, FramesConfig(2, 2))
    first, second = (by_row(list(one.segment(ArrayVideo(4), TEXTS)), 3, 4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, MemoryBank | Prompter | FrameStream)]


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


def test_a_frame_without_seg_is_a_hole_for_its_sentence_alone(tiny_model):
    model = answering_sometimes(tiny_model)
    results = run(model, ArrayVideo(12))
    has_seg = np.stack([result.has_seg_R for result in results])
    assert 0 < has_seg.mean() < 1
    masks_ETHW = by_row(results, 3, 12)
    for text, masks_THW in zip(TEXTS, masks_ETHW, strict=True):
        logits_THW = plain_logits(model, ArrayVideo(12), text)
        np.testing.assert_array_equal(np.isneginf(logits_THW).all((1, 2)), ~has_seg[:, TEXTS.index(text)])
        assert_same(masks_THW, logits_THW)


def test_what_is_kept_does_not_grow_with_the_video(seg_model, monkeypatch):
    """Tokens of the last Q - 1 frames; frames read ahead; context frames until they are segmented."""
    kept = []
    original = VideoRun._forget_tokens

    def forget(run: VideoRun, *arguments: object) -> None:
        original(run, *arguments)
        kept.append((len(run._tokens), len(run._held), len(run._stream._coming)))

    monkeypatch.setattr(VideoRun, "_forget_tokens", forget)
    run(seg_model, ArrayVideo(60), TEXTS[:1], frames=FramesConfig(2, 3), chunk_frames=4)
    assert max(stream for _, _, stream in kept) == 8
    assert kept[5][:2] == kept[6][:2] == (2 + 1, 1)  # one context frame lies ahead
    assert kept[13][:2] == (2, 0)


def test_the_vocabularys_logits_live_for_one_batch_of_prompts(seg_model, monkeypatch):
    """Those of all sentences and frames of a chunk are gigabytes where the vocabulary is large."""
    kept: list[weakref.ref[torch.Tensor]] = []
    original = Glus.answer

    def answer(glus: Glus, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert not any(logits() is not None for logits in kept)
        embeds, logits = original(glus, states)
        kept.append(weakref.ref(logits))
        return embeds, logits

    monkeypatch.setattr(Glus, "answer", answer)
    run(seg_model, ArrayVideo(4), token_budget=1)
    assert len(kept) > 4


def test_a_bounded_number_of_frames_waits_for_the_second_pass(seg_model, monkeypatch):
    kept = []
    original = VideoRun._forget_tokens

    def forget(run: VideoRun, *arguments: object) -> None:
        original(run, *arguments)
        kept.append(len(run._tokens))

    monkeypatch.setattr(VideoRun, "_forget_tokens", forget)
    ways = {"frames": FramesConfig(2, 3), "chunk_frames": 4, "key_frames": [29, 3]}
    expected = by_row(run(seg_model, ArrayVideo(30), TEXTS[:2], **ways), 2, 30)
    assert max(kept) >= 27
    kept.clear()
    monkeypatch.setattr(video_run, "KEPT_FOR_SECOND_PASS", 5)
    with counted(seg_model.glus) as counts:
        found = by_row(run(seg_model, ArrayVideo(30), TEXTS[:2], **ways), 2, 30)
    np.testing.assert_array_equal(found, expected)
    assert max(kept) <= 5 + 2 + 2
    assert counts["CLIP images"] == 27 + 30 - 5


def test_seconds_of_each_stage_are_told(seg_model):
    one = predictor(seg_model, FramesConfig(2, 2))
    list(one.segment(ArrayVideo(3), TEXTS))
    assert set(one.seconds) == set(STAGES)
    assert min(one.seconds.values()) > 0


@pytest.mark.parametrize(
    ("texts", "key_frames", "message"),
    [
        ([], None, "nothing to segment: 0 sentences, 5 frames"),
        (TEXTS, [0, 1, 5], "key frame 5: the video has frames 0 to 4"),
        (TEXTS, [-1, 0, 0], "key frame -1"),
        (TEXTS, [0], "1 key frames for 3 sentences"),
    ],
)
def test_impossible_requests(seg_model, texts, key_frames, message):
    with pytest.raises(ValueError, match=message):
        run(seg_model, ArrayVideo(5), texts, key_frames)


def test_clips_of_spread_frames_are_refused(seg_model):
    with pytest.raises(ValueError, match=r"inference.window=clips needs frames.query_sampling=consecutive"):
        predictor(seg_model, FramesConfig(2, 3, QuerySampling.uniform), window=Window.clips)


def test_an_unreadable_frame_stops_with_its_name_after_the_frames_before(seg_model):
    class Broken(ArrayVideo):
        def read(self, index: int) -> np.ndarray:
            if index == 5:
                raise ValueError("frame shapes/a/00005 does not decode")
            return super().read(index)

    results = predictor(seg_model, FramesConfig(1, 2), chunk_frames=2).segment(Broken(9), TEXTS)
    assert [next(results).frame for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="00005 does not decode"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frames")]


def test_an_unreadable_context_frame_leaves_no_thread_behind(seg_model):
    class Broken(ArrayVideo):
        def read(self, index: int) -> np.ndarray:
            raise ValueError(f"frame {index} does not decode")

    with pytest.raises(ValueError, match="does not decode"):
        list(predictor(seg_model, FramesConfig(2, 2)).segment(Broken(9), TEXTS))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frames")]


def test_bfloat16(tiny_model):
    model = replace(tiny_model, glus=copy.deepcopy(tiny_model.glus).bfloat16())
    for result in run(model, ArrayVideo(3), force_seg=True):
        assert result.scores_R.dtype == np.float32
        assert result.masks_RHW.dtype == bool


MASK_BIAS = "segmenter.sam.sam_mask_decoder.output_hypernetworks_mlps.0.layers.2.bias"


def damaged(model: LoadedModel, part: str) -> LoadedModel:
    """The model, always answering with [SEG], with one infinite weight."""
    model = answering(model)
    with torch.no_grad():
        model.glus.get_parameter(part)[0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("mllm.llama.model.norm.weight", "the LLM's answer"),
        ("seg_head.fc2.bias", "the LLM's answer"),
        (MASK_BIAS, "the segmenter's mask"),
    ],
)
def test_what_is_not_finite_is_named_and_gives_no_empty_mask(tiny_model, part, what):
    message = rf"frame number 0, sentence 'the red circle': {what} is not finite; .*float32"
    with pytest.raises(ValueError, match=message):
        run(damaged(tiny_model, part), ArrayVideo(3))


def test_of_masks_that_are_not_finite_the_first_frames_own_sentence_is_named(tiny_model):
    """With key frames: only the second sentence is segmented in frame 1."""
    segmenting = predictor(damaged(tiny_model, MASK_BIAS), FramesConfig(2, 2)).segment(ArrayVideo(4), TEXTS[:2], [3, 1])
    with pytest.raises(ValueError, match=rf"frame number 1, sentence '{TEXTS[1]}': the segmenter's mask is not finite"):
        list(segmenting)


def test_a_model_in_training_mode_is_refused(tiny_model):
    """Its adapters would drop activations at random."""
    model = answering(tiny_model)
    model.glus.train()
    with pytest.raises(AssertionError, match=r"glus\.eval\(\)"):
        run(model, ArrayVideo(2))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32), (None, torch.float32)]
)
def test_the_precision_of_a_prediction_can_be_chosen(model_folder, precision, dtype):
    settings = SettingsConfig(precision=Precision(precision) if precision else None)
    one, model = load_predictor(model_folder, settings)
    assert {parameter.dtype for parameter in one.glus.parameters()} == {dtype}
    assert model.config.model.precision is Precision(precision or "fp32")
    for result in one.segment(ArrayVideo(3), TEXTS):
        assert result.masks_RHW.dtype == bool
        assert np.isfinite(result.scores_R).all()
