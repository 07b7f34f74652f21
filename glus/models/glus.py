"""Glus: the verbs of the method, and the unroll over query frames that training and pre-training share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from glus.batch import Batch, GlusOutput
from glus.models.mllm import Mllm
from glus.models.segmenter import MemoryBank, Segmenter


class SegHead(nn.Module):
    """[SEG] state -> prompt embedding: Linear, ReLU, Linear (the release's ``text_hidden_fcs``).

    Args:
        width: of the language model (D).
        prompt_width: of SAM2 (C).
        gain: factor on the initial weights of the second layer.
    """

    def __init__(self, width: int, prompt_width: int, gain: float = 1.0):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, prompt_width)
        with torch.no_grad():
            self.fc2.weight.mul_(gain)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., C)."""
        return self.fc2(torch.relu(self.fc1(states)))


class IouHead(nn.Module):
    """[SEG] state -> logit of the IoU that the frame's mask will reach: Linear, ReLU, Linear.

    The key-frame selector of the paper is a second model that predicts the same number; this head reads it from what
    the model knows anyway. No gradient reaches the state, so that training it changes nothing else.

    Args:
        width: of the language model (D).
        prompt_width: of SAM2 (C), the hidden width.
    """

    def __init__(self, width: int, prompt_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, prompt_width)
        self.fc2 = nn.Linear(prompt_width, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (...) float32."""
        return self.fc2(torch.relu(self.fc1(states.detach())))[..., 0].float()


def segment_step(
    segmenter: Segmenter,
    bank: MemoryBank,
    steps: Mapping[int, int],
    frame: Any,
    prompt_RC: torch.Tensor,
    memorize: bool = True,
    fallback: bool = False,
) -> torch.Tensor:
    """Segment one frame for some rows (expressions): recall, condition, decode, memorize.

    Args:
        segmenter: conditions, decodes and memorizes.
        bank: memories of this pass; it is written.
        steps: rows to segment, which have equally many memories -> the number of this frame in the pass of each; the
            other rows get a gap.
        frame: features, one row per entry of ``steps``, or 1 row that stands for all.
        prompt_RC: of each row.
        memorize: write this frame's memory; not worth it where no later frame follows.
        fallback: see ``Segmenter.decode``.

    Returns:
        Mask logits (R, m, m).
    """
    conditioned = segmenter.condition(frame, bank.recall(steps))
    logits_Rmm: torch.Tensor = segmenter.decode(conditioned, prompt_RC, fallback).logits_Nmm
    if memorize and bank.enabled:
        bank.store(steps, segmenter.memorize(conditioned, logits_Rmm))
    return logits_Rmm


class Glus(nn.Module):
    """Context and query frames and a sentence in; one mask per query frame out.

    Args:
        mllm: sees frames, reads conversations.
        seg_head: [SEG] state -> mask decoder prompt.
        segmenter: prompts and frames -> masks.
        memory_frames: memories read at most in training.
        memory_stride: distance of strided memories in training.
        memory_enabled: off, each frame is segmented by itself.
        iou_head: [SEG] state -> expected IoU, if it is wanted.
    """

    def __init__(
        self,
        mllm: Mllm,
        seg_head: SegHead,
        segmenter: Segmenter,
        memory_frames: int = 7,
        memory_stride: int = 1,
        memory_enabled: bool = True,
        iou_head: IouHead | None = None,
    ):
        super().__init__()
        self.mllm = mllm
        self.seg_head = seg_head
        self.segmenter = segmenter
        self.memory_frames = memory_frames
        self.memory_stride = memory_stride
        self.memory_enabled = memory_enabled
        self.iou_head = iou_head
        self.note_trained()

    def note_trained(self) -> None:
        """To be called when ``requires_grad`` of parameters has changed: what is frozen runs under no_grad."""
        self.mllm.note_trained()
        self.segmenter.note_trained()

    def memory_bank(self, stride: int | None = None) -> MemoryBank:
        """An empty bank for one pass; ``stride`` defaults to training's."""
        return MemoryBank(self.memory_frames, stride or self.memory_stride, self.memory_enabled)

    def answer(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (..., C) and vocabulary logits (..., V) of states (..., D) that are to predict [SEG]."""
        return self.seg_head(states), self.mllm.logits(states)

    def segment_clip(
        self, query_frames: list[torch.Tensor], video_index: torch.Tensor, embeds_NQC: torch.Tensor
    ) -> torch.Tensor:
        """Mask logits (N, Q, m, m) of the query frames, in order, each reading the memories of those before it.

        Args:
            query_frames: B tensors (Q, H, W, 3) uint8; each frame is encoded once for all its expressions.
            video_index: (N,) row of the video of each expression.
            embeds_NQC: prompts.
        """
        num_rows, num_query = embeds_NQC.shape[:2]
        images = torch.cat([self.segmenter.prepare_frames(video) for video in query_frames])
        features = self.segmenter.encode_frames(images)
        bank = self.memory_bank()
        masks = []
        for q in range(num_query):
            frame, steps = features.rows(video_index * num_query + q), dict.fromkeys(range(num_rows), q)
            is_last = q + 1 == num_query
            masks.append(segment_step(self.segmenter, bank, steps, frame, embeds_NQC[:, q], memorize=not is_last))
        return torch.stack(masks, dim=1)

    def forward(self, batch: Batch) -> GlusOutput:
        """The training forward pass; sampling, text and losses live elsewhere."""
        pixels_BF3ss = torch.cat([batch.context_pixels, batch.query_pixels], dim=1)
        visual_TD = self.mllm.see(pixels_BF3ss.flatten(0, 1)).flatten(0, 1)
        states_RD, _ = self.mllm.states(batch.rows, visual_TD)
        states_NQD = states_RD.unflatten(0, (len(batch.video_index), -1))
        embeds_NQC, logits_NQV = self.answer(states_NQD)
        masks_NQmm = self.segment_clip(batch.query_frames, batch.video_index, embeds_NQC)
        iou_logits_NQ = None if self.iou_head is None else self.iou_head(states_NQD)
        return GlusOutput(logits_NQV, embeds_NQC, masks_NQmm, iou_logits_NQ)
