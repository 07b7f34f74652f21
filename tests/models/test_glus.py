"""The unroll over query frames, and what must not depend on what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glus.batch import Batch, GlusOutput
from glus.data.chat.tree import pack_conversations, unpack_conversations
from glus.models.glus import Glus, MemoryBank, SegHead, segment_step
from glus.models.segmenter.sam2 import FrameFeatures
from tests.models.conftest import BatchMaker
from tests.models.test_packing import clip_masks, separate_states


def _row(batch: Batch, row: int) -> Batch:
    """One expression of a batch, with its video alone."""
    video = int(batch.video_index[row])
    return replace(
        batch,
        context_pixels=[batch.context_pixels[video]],
        query_pixels=[batch.query_pixels[video]],
        query_frames=[batch.query_frames[video]],
        rows=pack_conversations([[unpack_conversations(batch.rows)[row]]], pad_id=0),
        video_index=torch.zeros(1, dtype=torch.int64),
        target_masks=[batch.target_masks[row]],
        object_keys=[batch.object_keys[row]],
        names=[batch.names[row]],
    )


def _forward(glus: Glus, batch: Batch) -> GlusOutput:
    with torch.no_grad():
        return glus(batch)


def _calls(module: torch.nn.Module) -> list[int]:
    """Rows of each call of ``module`` from now on."""
    rows: list[int] = []
    module.register_forward_hook(lambda _, inputs, kwargs, __: rows.append(len(inputs[0])), with_kwargs=True)
    return rows


@pytest.mark.parametrize(("num_context", "num_query"), [(2, 3), (0, 2), (1, 1), (0, 1)])
def test_output_shapes_follow_the_batch(glus: Glus, make_batch: BatchMaker, num_context: int, num_query: int) -> None:
    output = _forward(glus, make_batch((2, 1), num_context, num_query))
    vocabulary = glus.mllm.llama.config.vocab_size
    assert output.seg_logits_NQV.shape == (3, num_query, vocabulary)
    assert output.seg_embeds_NQC.shape == (3, num_query, glus.segmenter.width)
    assert output.mask_logits_NQmm.shape == (3, num_query, 16, 16)


def test_expressions_give_the_same_masks_alone_and_together(glus: Glus, make_batch: BatchMaker) -> None:
    batch = make_batch((3, 1, 2), 2, 3)
    together = _forward(glus, batch)
    scale = together.mask_logits_NQmm.abs().max()
    for row in range(6):
        alone = _forward(glus, _row(batch, row))
        torch.testing.assert_close(alone.seg_embeds_NQC[0], together.seg_embeds_NQC[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            alone.mask_logits_NQmm[0], together.mask_logits_NQmm[row], rtol=0, atol=float(scale) * 1e-5
        )


def test_expressions_and_videos_are_told_apart(glus: Glus, make_batch: BatchMaker) -> None:
    embeds = _forward(glus, make_batch((2, 2))).seg_embeds_NQC.flatten(0, 1)
    assert torch.pdist(embeds).min() > 1e-4


def test_a_frame_is_encoded_once_for_all_its_expressions_and_all_frames_together(
    glus: Glus, make_batch: BatchMaker
) -> None:
    clip, image = _calls(glus.mllm.clip), _calls(glus.segmenter.sam.image_encoder)
    _forward(glus, make_batch((3, 2), 2, 3))
    assert clip == [2 * (2 + 3)]
    assert image == [2 * 3]


def test_logits_are_computed_where_seg_is_to_come_and_nowhere_else(glus: Glus, make_batch: BatchMaker) -> None:
    shapes: list[torch.Size] = []
    glus.mllm.llama.lm_head.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    _forward(glus, make_batch((3, 2), 2, 3))
    assert shapes == [(5, 3, glus.mllm.width)]


def test_attention_is_torchs_fused_one(glus: Glus, make_batch: BatchMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer of the LLM: one causal call for all conversations, so that no matrix of scores is kept."""
    calls, attend = [], F.scaled_dot_product_attention

    def counted(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        assert options["is_causal"]
        assert options["attn_mask"] is None
        calls.append(len(query))
        return attend(query, *others, **options)

    batch = make_batch((3, 2))
    tokens = glus.see(batch)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    glus.mllm.states(batch.rows, tokens)
    assert calls == [5] * len(glus.mllm.llama.model.layers)


def test_the_last_query_frame_is_not_memorised(glus: Glus, make_batch: BatchMaker) -> None:
    memorized = _calls(glus.segmenter.sam.memory_encoder)
    _forward(glus, make_batch((2,), 1, 3))
    assert memorized == [2, 2]


def test_context_frames_come_before_query_frames_and_seg_is_read_one_position_early(
    glus: Glus, make_batch: BatchMaker
) -> None:
    batch = make_batch((2, 1), 1, 2)
    visual = []
    for video in batch.video_index.tolist():
        for pixels in (batch.context_pixels[video], batch.query_pixels[video]):
            visual.append(glus.mllm.see(pixels).flatten(0, 1))
    assert len(batch.rows.input_ids_BL.flatten()[batch.rows.reads_R + 1].unique()) == 1  # [SEG] everywhere
    embeds, logits = glus.answer(separate_states(glus, batch, torch.cat(visual)))
    output = _forward(glus, batch)
    torch.testing.assert_close(output.seg_embeds_NQC, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.seg_logits_NQV, logits, rtol=0, atol=1e-5)


def test_memories_are_made_of_the_conditioned_feature(glus: Glus) -> None:
    segmenter, bank = glus.segmenter, MemoryBank(num_frames=3, stride=1)
    prompt = torch.randn(1, segmenter.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = segmenter.prepare_frames(torch.full((1, 40, 56, 3), 90, dtype=torch.uint8))
        frame = segmenter.encode_frames(image)
        for step in range(2):
            conditioned = segmenter.condition(frame, bank.recall({0: step}))
            logits = segment_step(segmenter, bank, {0: step}, frame, prompt)[1].logits_Nmm
            recalled = bank.recall({0: step + 1})
            assert recalled is not None
            stored = recalled[:, -1]
            torch.testing.assert_close(stored, segmenter.memorize(conditioned, logits))
            assert (stored - segmenter.memorize(frame, logits)).abs().max() > 1e-4


def test_each_query_frame_is_segmented_with_its_own_prompt(glus: Glus, make_batch: BatchMaker) -> None:
    batch = make_batch((2, 1), 1, 2)
    glus.memory_enabled = False
    embeds = torch.randn(3, 2, glus.segmenter.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks = clip_masks(glus, batch, embeds)
        for row, video in enumerate(batch.video_index.tolist()):
            for q in range(2):
                image = glus.segmenter.prepare_frames(batch.query_frames[video][[q]])
                conditioned = glus.segmenter.condition(glus.segmenter.encode_frames(image), None)
                expected = glus.segmenter.decode(conditioned, embeds[[row], q]).logits_Nmm[0]
                torch.testing.assert_close(masks[row, q], expected, rtol=0, atol=1e-5)


def test_memory_changes_later_frames_only(glus: Glus, make_batch: BatchMaker) -> None:
    batch = make_batch((2, 1), 1, 3)
    with_memory = _forward(glus, batch).mask_logits_NQmm
    glus.memory_enabled = False
    without = _forward(glus, batch).mask_logits_NQmm
    assert torch.equal(with_memory[:, 0], without[:, 0])
    assert (with_memory[:, 1:] - without[:, 1:]).abs().amax((2, 3)).min() > 1e-6


def test_num_frames_of_memory_are_read(glus: Glus, make_batch: BatchMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    condition = glus.segmenter.condition

    def counted(frame: FrameFeatures, memories: torch.Tensor | None) -> FrameFeatures:
        read.append(0 if memories is None else memories.shape[1])
        return condition(frame, memories)

    monkeypatch.setattr(glus.segmenter, "condition", counted)
    glus.memory_frames = 2
    _forward(glus, make_batch((1,), 1, 5))
    assert read == [0, 1, 2, 2, 2]


def _clip_gradient(glus: Glus, batch: Batch, detach: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of two frames, and the gradient of the second frame's mask with respect to both prompts."""
    glus.segmenter.memory_gradient = not detach
    embeds = torch.randn(3, 2, glus.segmenter.width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masks = clip_masks(glus, batch, embeds)
    (gradient,) = torch.autograd.grad(masks[:, 1].square().mean(), embeds)
    return masks.detach(), gradient


def test_detach_decides_whether_gradients_cross_frames(glus: Glus, make_batch: BatchMaker) -> None:
    batch = make_batch((2, 1), 1, 2)
    cut_masks, cut = _clip_gradient(glus, batch, detach=True)
    masks, whole = _clip_gradient(glus, batch, detach=False)
    assert torch.equal(masks, cut_masks)
    assert cut[:, 0].abs().max() == 0
    assert whole[:, 0].abs().amax(-1).min() > 0
    torch.testing.assert_close(whole[:, 1], cut[:, 1])  # the direct path is the same


def test_the_gradient_through_memory_is_the_true_one(glus: Glus, make_batch: BatchMaker) -> None:
    """Against central differences in float64: through memory encoder, memory attention and decoder."""
    glus = glus.double()
    glus.segmenter.memory_gradient = True
    batch = make_batch((1,), 0, 2)
    embeds = torch.randn(1, 2, glus.segmenter.width, generator=torch.Generator().manual_seed(0)).double()
    direction = torch.zeros_like(embeds)
    direction[:, 0] = torch.randn(glus.segmenter.width, generator=torch.Generator().manual_seed(1)).double()

    def second_mask(prompts: torch.Tensor) -> torch.Tensor:
        return clip_masks(glus, batch, prompts)[:, 1].square().mean()

    leaf = embeds.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(second_mask(leaf), leaf)
    step = 1e-3
    with torch.no_grad():
        slope = (second_mask(embeds + step * direction) - second_mask(embeds - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("detach", [True, False])
def test_memory_modules_get_gradients_when_they_are_trained(glus: Glus, make_batch: BatchMaker, detach: bool) -> None:
    """The memory encoder only with ``detach: false``: a detached memory ends its gradient."""
    glus.requires_grad_(False)
    sam = glus.segmenter.sam
    for module in (sam.memory_attention, sam.memory_encoder):
        module.requires_grad_(True)
    glus.segmenter.note_trained()
    glus.segmenter.memory_gradient = not detach
    glus(make_batch((2,), 1, 2)).mask_logits_NQmm[:, 1].square().mean().backward()
    norms = {
        name: sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)
        for name, module in (("attention", sam.memory_attention), ("encoder", sam.memory_encoder))
    }
    assert norms["attention"] > 0
    assert (norms["encoder"] > 0) is not detach


def test_a_trained_image_encoder_gets_gradients_and_a_frozen_one_none(glus: Glus, make_batch: BatchMaker) -> None:
    batch = make_batch((2,), 1, 2)
    encoder = glus.segmenter.sam.image_encoder
    for trained in (False, True):
        encoder.requires_grad_(trained)
        glus.segmenter.note_trained()
        glus(batch).mask_logits_NQmm.square().mean().backward()
        assert (encoder.trunk.patch_embed.proj.weight.grad is not None) is trained


def _steps(glus: Glus, rows_of_step: list[list[int]], num_rows: int, one: bool) -> dict[int, list[torch.Tensor]]:
    """Masks of each row over steps in which only some rows have a [SEG]; a frame is ``one`` row or one for each."""
    segmenter, generator = glus.segmenter, torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (len(rows_of_step), 40, 56, 3), dtype=torch.uint8, generator=generator)
    prompts = torch.randn(len(rows_of_step), num_rows, segmenter.width, generator=generator)
    bank = MemoryBank(num_frames=3, stride=1)
    masks: dict[int, list[torch.Tensor]] = {row: [] for row in range(num_rows)}
    with torch.no_grad():
        features = segmenter.encode_frames(segmenter.prepare_frames(frames))
        for step, rows in enumerate(rows_of_step):
            for alike in bank.alike(dict.fromkeys(rows, step)):
                frame = features.frame(step) if one else features.rows([step] * len(alike))
                _, decoded = segment_step(segmenter, bank, dict.fromkeys(alike, step), frame, prompts[step, alike])
                for row, mask in zip(alike, decoded.logits_Nmm, strict=True):
                    masks[row].append(mask)
    return masks


@pytest.mark.parametrize(
    "pattern",
    [
        [[0, 1, 2], [2, 0], [1, 2], [], [0, 1, 2], [2, 1, 0]],
        [[0, 3], [0, 1, 2, 3], [3, 2, 0, 1]],  # groups {0, 3} and {1, 2} interleave
    ],
)
@pytest.mark.parametrize("one", [False, True])
def test_rows_with_holes_are_segmented_as_if_alone(glus: Glus, pattern: list[list[int]], one: bool) -> None:
    num_rows = 1 + max(pattern[-1])
    together = _steps(glus, pattern, num_rows, one)
    for row in range(num_rows):
        alone = _steps(glus, [[row] if row in rows else [] for rows in pattern], num_rows, one=False)
        for mask, expected in zip(together[row], alone[row], strict=True):
            torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


def test_forward_and_backward_run_in_bfloat16(glus: Glus, make_batch: BatchMaker) -> None:
    glus.to(torch.bfloat16).train()
    output = glus(make_batch((2, 1)))
    (output.mask_logits_NQmm.float().square().mean() + output.seg_logits_NQV.float().square().mean()).backward()
    assert output.mask_logits_NQmm.dtype is torch.bfloat16
    for name, parameter in glus.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad.float()).all(), name


def test_seg_head_is_linear_relu_linear() -> None:
    torch.manual_seed(0)
    head: Any = SegHead(6, 3)
    x = torch.randn(4, 5, 6)
    hidden = (x @ head.fc1.weight.T + head.fc1.bias).clamp(min=0)
    torch.testing.assert_close(head(x), hidden @ head.fc2.weight.T + head.fc2.bias)


def test_the_gain_of_the_seg_head_scales_its_first_prompts() -> None:
    heads = []
    for gain in (1.0, 5.0):
        torch.manual_seed(0)
        heads.append(SegHead(8, 4, gain))
    states = torch.randn(3, 8)
    plain, strong = (head(states) - head.fc2.bias for head in heads)
    torch.testing.assert_close(strong, 5 * plain)
    torch.manual_seed(0)
    assert torch.equal(heads[0].fc1.weight, nn.Linear(8, 8).weight)  # at gain 1, PyTorch's initialisation
