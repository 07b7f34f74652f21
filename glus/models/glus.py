"""Glus: the verbs of the method, and the unroll over query frames that training and pre-training share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from glus.batch import Batch, GlusOutput
from glus.models.mllm.attention import PackedRows
from glus.models.mllm.llava import ClipEncoder, LanguageModel
from glus.models.segmenter.memory import MemoryBank
from glus.models.segmenter.sam2 import DecodedMasks, FrameFeatures, Sam2Segmenter, is_trained


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
    segmenter: Sam2Segmenter,
    bank: MemoryBank,
    steps: Mapping[int, int],
    frame: FrameFeatures,
    prompt_RC: torch.Tensor,
    memorize: bool = True,
) -> DecodedMasks:
    """Segment one frame for some rows: recall, condition, decode, memorize.

    Args:
        segmenter: SAM2.
        bank: memories of this pass; it is written.
        steps: rows of the bank (expressions) to segment -> the number of this frame in the pass of each; the others
            get a gap.
        frame: features, one row per entry of ``steps``, or 1 row that stands for all.
        prompt_RC: prompts, likewise.
        memorize: write this frame's memory; not worth it where no later frame follows.

    Returns:
        Masks in the order of ``steps``.
    """
    slots = {row: slot for slot, row in enumerate(steps)}
    images: dict[int, torch.Tensor] = {}
    groups = bank.recall(steps)
    is_for_all = len(frame.image_NChw) == 1 or len(groups) == 1
    for rows, memories in groups:
        own = frame if is_for_all else frame.rows([slots[row] for row in rows])
        image_RChw = segmenter.condition(own, memories).image_NChw
        images |= zip(rows, image_RChw.expand(len(rows), -1, -1, -1), strict=True)
    conditioned = frame.with_image(torch.stack([images[row] for row in steps]))
    decoded = segmenter.decode(conditioned, prompt_RC)
    if memorize and bank.enabled:
        bank.store(steps, segmenter.memorize(conditioned, decoded.logits_Nmm).features_NChw)
    return decoded


class Glus(nn.Module):
    """Context and query frames and a sentence in; one mask per query frame out.

    Args:
        clip: what the LLM sees through.
        projector: CLIP width -> LLM width.
        language: the LLM.
        seg_head: [SEG] state -> mask decoder prompt.
        segmenter: SAM2.
        memory_frames: memories read at most in training.
        memory_stride: distance of strided memories in training.
        memory_enabled: off, each frame is segmented by itself.
        iou_head: [SEG] state -> expected IoU, if it is wanted.
    """

    def __init__(
        self,
        clip: ClipEncoder,
        projector: nn.Linear,
        language: LanguageModel,
        seg_head: SegHead,
        segmenter: Sam2Segmenter,
        memory_frames: int = 7,
        memory_stride: int = 1,
        memory_enabled: bool = True,
        iou_head: IouHead | None = None,
    ):
        super().__init__()
        self.clip = clip
        self.projector = projector
        self.language = language
        self.seg_head = seg_head
        self.segmenter = segmenter
        self.memory_frames = memory_frames
        self.memory_stride = memory_stride
        self.memory_enabled = memory_enabled
        self.iou_head = iou_head
        self.note_trained()

    def note_trained(self) -> None:
        """To be called when ``requires_grad`` of parameters has changed: what is frozen runs under no_grad."""
        self._clip_is_trained = is_trained(self.clip)
        self.segmenter.note_trained()

    @property
    def tokens_per_frame(self) -> int:
        """P, which the tokenizer needs to expand each image."""
        return self.clip.tokens_per_frame

    def memory_bank(self, stride: int | None = None) -> MemoryBank:
        """An empty bank for one pass; ``stride`` defaults to training's."""
        stride = stride or self.memory_stride
        return MemoryBank(self.memory_frames, stride, self.memory_enabled)

    def vision_tokens(self, crops_BFCss: torch.Tensor) -> torch.Tensor:
        """Visual tokens of frames: (B, F, 3, s, s) uint8 -> (B, F, P, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._clip_is_trained):
            features = self.clip(crops_BFCss.flatten(0, 1))
        return self.projector(features).unflatten(0, crops_BFCss.shape[:2])

    def answer(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (..., C) and vocabulary logits (..., V) of states (..., D) that are to predict [SEG]."""
        return self.seg_head(states), self.language.logits(states)

    def segment_clip(
        self, query_frames: list[torch.Tensor], video_index: torch.Tensor, embeds_NQC: torch.Tensor
    ) -> torch.Tensor:
        """Mask logits (N, Q, m, m) of the query frames, in order, each reading the memories of those before it.

        Args:
            query_frames: B tensors (Q, H, W, 3) uint8, each frame is encoded once for all its expressions.
            video_index: (N,) row of the video of each expression.
            embeds_NQC: prompts.
        """
        num_rows, num_query = embeds_NQC.shape[:2]
        images = [self.segmenter.prepare_frames(video_QHW3) for video_QHW3 in query_frames]
        features = self.segmenter.encode_frames(torch.cat(images))
        bank = self.memory_bank()
        masks = []
        for q in range(num_query):
            frame = features.rows(video_index * num_query + q)
            steps = dict.fromkeys(range(num_rows), q)
            decoded = segment_step(self.segmenter, bank, steps, frame, embeds_NQC[:, q], memorize=q + 1 < num_query)
            masks.append(decoded.logits_Nmm)
        return torch.stack(masks, dim=1)

    def forward(self, batch: Batch) -> GlusOutput:
        """The training forward pass; sampling, text and losses live elsewhere."""
        tokens_BFPD = self.vision_tokens(torch.cat([batch.context_clip, batch.query_clip], dim=1))
        visual_MD = tokens_BFPD.flatten(0, 2)[batch.visual_index]
        embeds_BLD = self.language.splice(batch.input_ids, batch.placeholders, visual_MD)
        packed = PackedRows(batch.conversation_tokens, batch.token_places)
        states_BLD = self.language.packed_states(embeds_BLD, batch.position_ids, packed)
        states_NQD = states_BLD[batch.video_index[:, None], batch.seg_positions]
        embeds_NQC, logits_NQV = self.answer(states_NQD)
        masks_NQmm = self.segment_clip(batch.query_frames, batch.video_index, embeds_NQC)
        iou_logits_NQ = None if self.iou_head is None else self.iou_head(states_NQD)
        return GlusOutput(logits_NQV, embeds_NQC, masks_NQmm, iou_logits_NQ)
