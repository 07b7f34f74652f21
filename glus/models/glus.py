"""Glus: the verbs of the method, its memory bank, and the unroll over query frames that all training shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from glus.batch import Batch, GlusOutput
from glus.config import SegState
from glus.models.mllm import Mllm
from glus.models.segmenter import Segmenter


class SegHead(nn.Module):
    """[SEG] state -> prompt embedding: Linear, ReLU, Linear (the release's ``text_hidden_fcs``).

    Args:
        width: of the language model (D).
        prompt_width: of the segmenter (C).
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
        prompt_width: of the segmenter (C), the hidden width.
    """

    def __init__(self, width: int, prompt_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, prompt_width)
        self.fc2 = nn.Linear(prompt_width, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (...) float32."""
        return self.fc2(torch.relu(self.fc1(states.detach())))[..., 0].float()


def memory_frames(frame: int, num_frames: int, stride: int) -> list[int]:
    """Frames that ``frame`` may read, oldest first.

    The previous frame, and ``num_frames - 1`` frames before it on multiples of ``stride``:
    ``{f-1} U {((f-2)//r)*r - k*r, k = 0 .. num_frames-2}`` without negatives (released GLUS.py:230-276). Frames are
    counted from the start of the pass, in processing order.
    """
    newest = (frame - 2) // stride * stride
    strided = {newest - k * stride for k in range(num_frames - 1)} if frame >= 2 else set()
    return sorted(f for f in strided | {frame - 1} if f >= 0)


class MemoryBank:
    """Memories of one pass over one video (or one training window), for any number of rows (expressions).

    Every row counts its own steps, since key frames let rows start at different frames. A row whose [SEG] failed in a
    frame stores nothing there: its later frames find a gap, those of other rows do not. What no later step of a row
    can read is forgotten, so the bank's size does not grow with the video.

    Args:
        num_frames: memories read at most.
        stride: distance of the strided ones.
        enabled: off, nothing is stored, so nothing is recalled.
    """

    def __init__(self, num_frames: int, stride: int, enabled: bool = True):
        self.num_frames = num_frames
        self.stride = stride
        self.enabled = enabled
        self._steps: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)  # row -> step -> (C_mem, h, w)

    def alike(self, steps: Mapping[int, int]) -> list[list[int]]:
        """The rows, grouped by how many memories each would recall.

        Args:
            steps: row -> its coming step, counted from 0 where the row's pass began.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for row, step in steps.items():
            groups[len(self._recalled(row, step))].append(row)
        return list(groups.values())

    def recall(self, steps: Mapping[int, int]) -> torch.Tensor | None:
        """Memories (N, T, C_mem, h, w) of rows that have equally many, oldest first; None if these are none.

        Args:
            steps: see ``alike``.
        """
        found = [self._recalled(row, step) for row, step in steps.items()]
        (count,) = {len(memories) for memories in found}
        return torch.stack([torch.stack(memories) for memories in found]) if count else None

    def _recalled(self, row: int, step: int) -> list[torch.Tensor]:
        held = self._steps[row]
        return [held[s] for s in memory_frames(step, self.num_frames, self.stride) if s in held]

    def store(self, steps: Mapping[int, int], memory_NChw: torch.Tensor) -> None:
        """Keep what rows made of a frame, and forget what none of their later steps can read.

        Args:
            steps: row -> the step it has done, in the order of ``memory_NChw``'s rows.
            memory_NChw: one row for each.
        """
        if self.enabled:
            for (row, step), memory in zip(steps.items(), memory_NChw, strict=True):
                self._steps[row][step] = memory.clone()  # a view would keep all rows' memories as long as its own
            self.forget({row: step + 1 for row, step in steps.items()})

    def forget(self, steps: Mapping[int, int]) -> None:
        """Forget what rows cannot read any more; also to be called for rows that store nothing.

        Args:
            steps: row -> its coming step.
        """
        for row, coming in steps.items():
            oldest = (coming - 2) // self.stride * self.stride - (self.num_frames - 2) * self.stride
            for step in list(self._steps[row]):
                on_stride = self.num_frames > 1 and step % self.stride == 0 and step >= oldest
                if step < coming - 1 and not on_stride:
                    del self._steps[row][step]


def upsample_masks(logits_Nmm: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mask logits at ``size`` = (H, W): bilinear in float32, no post-processing (released GLUS.py:756)."""
    return F.interpolate(logits_Nmm[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def segment_step(
    segmenter: Segmenter,
    bank: MemoryBank,
    steps: Mapping[int, int],
    frame: Any,
    prompt_RC: torch.Tensor,
    memorize: bool = True,
    fallback: bool = False,
) -> tuple[Any, Any]:
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
        What ``Segmenter.condition`` and ``Segmenter.decode`` give for R rows.
    """
    conditioned = segmenter.condition(frame, bank.recall(steps))
    decoded = segmenter.decode(conditioned, prompt_RC, fallback)
    if memorize and bank.enabled:
        bank.store(steps, segmenter.memorize(conditioned, decoded.logits_Nmm))
    return conditioned, decoded


class Glus(nn.Module):
    """Context and query frames and a sentence in; one mask per query frame out.

    Args:
        mllm: sees frames, reads conversations.
        seg_head: [SEG] state -> mask decoder prompt.
        segmenter: prompts and frames -> masks.
        memory_frames: memories read at most in training.
        memory_stride: distance of strided memories in training.
        memory_enabled: off, each frame is segmented by itself.
        seg_state: with ``at``, states come in pairs: before each [SEG], and at it.
    """

    def __init__(
        self,
        mllm: Mllm,
        seg_head: SegHead,
        segmenter: Segmenter,
        memory_frames: int = 7,
        memory_stride: int = 1,
        memory_enabled: bool = True,
        seg_state: SegState = SegState.predicting,
    ):
        super().__init__()
        self.mllm = mllm
        self.seg_head = seg_head
        self.segmenter = segmenter
        self.memory_frames = memory_frames
        self.memory_stride = memory_stride
        self.memory_enabled = memory_enabled
        self.seg_state = seg_state
        self.iou_head: IouHead | None = None
        """[SEG] state -> expected IoU, if it is wanted."""

    def memory_bank(self, stride: int | None = None) -> MemoryBank:
        """An empty bank for one pass; ``stride`` defaults to training's."""
        return MemoryBank(self.memory_frames, stride or self.memory_stride, self.memory_enabled)

    def answer(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (..., R, C) and vocabulary logits (..., R, V) of the states that were read for R [SEG]:
        (..., R, D), or (..., 2 R, D) in pairs."""
        return self.seg_head(self._prompting(states)), self.mllm.decoder.logits(states[..., :: self.reads, :])

    def expect_iou(self, states: torch.Tensor) -> torch.Tensor | None:
        """Logits (..., R) of the IoU that is expected of the masks, of the same states; None without a head."""
        return None if self.iou_head is None else self.iou_head(self._prompting(states))

    @property
    def reads(self) -> int:
        """States that are read for each [SEG]."""
        return 2 if self.seg_state is SegState.at else 1

    def _prompting(self, states: torch.Tensor) -> torch.Tensor:
        return states[..., self.reads - 1 :: self.reads, :]

    def decode_clip(
        self, query_frames: list[torch.Tensor], video_index: torch.Tensor, embeds_NQC: torch.Tensor
    ) -> list[Any]:
        """What ``Segmenter.decode`` gives for Q query frames, in order, each reading the memories of those before it.

        Args:
            query_frames: B tensors (Q, H, W, 3) uint8; each frame is encoded once for all its expressions.
            video_index: (N,) row of the video of each expression.
            embeds_NQC: prompts.
        """
        num_rows, num_query = embeds_NQC.shape[:2]
        images = torch.cat([self.segmenter.prepare_frames(video) for video in query_frames])
        features = self.segmenter.encode_frames(images)
        bank = self.memory_bank()
        decoded = []
        for q in range(num_query):
            frame, steps = features.rows(video_index * num_query + q), dict.fromkeys(range(num_rows), q)
            is_last = q + 1 == num_query
            _, of_frame = segment_step(self.segmenter, bank, steps, frame, embeds_NQC[:, q], memorize=not is_last)
            decoded.append(of_frame)
        return decoded

    def forward(self, batch: Batch) -> GlusOutput:
        """The training forward pass; sampling, text and losses live elsewhere."""
        states_RD, _ = self.mllm.states(batch.rows, self.see(batch))
        states_NQD = states_RD.unflatten(0, (len(batch.video_index), -1))
        embeds_NQC, logits_NQV = self.answer(states_NQD)
        decoded = self.decode_clip(batch.query_frames, batch.video_index, embeds_NQC)
        masks_NQmm = torch.stack([one.logits_Nmm for one in decoded], dim=1)
        mask_iou_NQ = torch.stack([one.predicted_iou_N for one in decoded], dim=1)
        object_logits_NQ = torch.stack([one.object_logits_N for one in decoded], dim=1)
        iou_logits_NQ = self.expect_iou(states_NQD)
        return GlusOutput(logits_NQV, embeds_NQC, masks_NQmm, iou_logits_NQ, mask_iou_NQ, object_logits_NQ)

    def see(self, batch: Batch) -> torch.Tensor:
        """Visual tokens (T, ...) of a batch: video by video, context before query frames; one size is seen together."""
        groups = [frames for video in zip(batch.context_pixels, batch.query_pixels, strict=True) for frames in video]
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for number, frames in enumerate(groups):
            if len(frames):
                by_size[frames.shape[1:]].append(number)
        seen: dict[int, torch.Tensor] = {}
        for numbers in by_size.values():
            tokens = self.mllm.see(torch.cat([groups[number] for number in numbers]))
            if len(by_size) == 1:
                return tokens.flatten(0, 1)
            parts = tokens.split([len(groups[number]) for number in numbers])
            seen |= {number: part.flatten(0, 1) for number, part in zip(numbers, parts, strict=True)}
        return torch.cat([seen[number] for number in sorted(seen)])
