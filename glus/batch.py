"""What the model is given and gives, and the legend of shape letters.

Shape letters, used as suffixes of tensor names (``embeds_NQC``):

====== ==============================================================================
``B``  videos of a batch
``N``  expressions of a batch; each is one conversation and points at one video
``K``  context frames, spread over the whole video
``Q``  query frames, each answered with one [SEG]
``F``  frames of one conversation, ``K + Q``
``P``  visual tokens of a frame after pooling
``L``  tokens of a conversation, or of all conversations of a video, after every image became ``P`` tokens
``M``  visual tokens of a whole batch, in the order of their placeholders
``D``  width of the language model
``C``  width of SAM2
``S``  side of SAM2's square input; ``m = S / 4`` is the side of its mask logits
``T``  frames of a video
``V``  vocabulary
``E``  expressions of one video at inference
``H W`` height and width of the original frames
====== ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from glus.types import ObjectKey


@dataclass(frozen=True)
class Conversation:
    """A tokenised conversation, images already expanded to their placeholders."""

    input_ids: np.ndarray
    """(L,) int64; each image is ``P`` times ``tokens.IMAGE_ID``."""
    seg_positions: np.ndarray
    """(Q,) int64: the position *before* each [SEG], whose state predicts it and is its embedding."""


@dataclass
class TrainSample:
    """One video with its drawn frames and sentences, before collation (CPU)."""

    context_clip: np.ndarray
    """(K, s, s, 3) uint8: CLIP crops of the context frames."""
    query_clip: np.ndarray
    """(Q, s, s, 3) uint8: CLIP crops of the query frames."""
    query_frames: np.ndarray
    """(Q, H, W, 3) uint8 RGB."""
    conversations: list[Conversation]
    """One per expression."""
    target_masks: list[np.ndarray]
    """One (Q, H, W) uint8 array of 0/1 per expression."""
    object_keys: list[list[ObjectKey]]
    """Q keys per expression."""
    names: list[str]
    """``Expression.name`` of each expression."""


@dataclass
class Batch:
    """Rows of expressions pointing at rows of videos; each frame of a video, and what its conversations begin with,
    is held once."""

    context_clip: torch.Tensor
    """(B, K, 3, s, s) uint8."""
    query_clip: torch.Tensor
    """(B, Q, 3, s, s) uint8."""
    query_frames: list[torch.Tensor]
    """B tensors (Q, H, W, 3) uint8, SAM2's resize happens on the device."""
    input_ids: torch.Tensor
    """(B, L) int64: what all conversations of the video begin with, then the rest of each; right-padded."""
    position_ids: torch.Tensor
    """(B, L) int64: position of each token in its own conversation; 0 on padding."""
    placeholders: torch.Tensor
    """(M,) int64: where visual tokens go, counted through the rows."""
    visual_index: torch.Tensor
    """(M,) int64: which of the videos' B * F * P visual tokens stands at each image placeholder, row by row."""
    conversation_tokens: torch.Tensor
    """(N, Lc) int64: the tokens of each conversation, counted through the rows; the last one again on padding."""
    token_places: torch.Tensor
    """(B, L) int64: a place of each token among ``conversation_tokens``, counted through; any place on padding."""
    seg_positions: torch.Tensor
    """(N, Q) int64: the position before each [SEG] in the row of the expression's video."""
    video_index: torch.Tensor
    """(N,) int64, the row of the video each expression belongs to."""
    target_masks: list[torch.Tensor]
    """N tensors (Q, H, W) uint8 of 0/1."""
    object_keys: list[list[ObjectKey]] = field(default_factory=list)
    """N lists of Q keys."""
    names: list[str] = field(default_factory=list)
    """N expression names."""

    @property
    def num_masks(self) -> int:
        """Number of (expression, query frame) pairs, which is also the number of [SEG]."""
        return self.seg_positions.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which ``to`` copies while the GPU works; a DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def changed(value: object) -> object:
            if isinstance(value, torch.Tensor):
                return change(value)
            if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                return [change(tensor) for tensor in value]
            return value

        return Batch(**{name: changed(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


class GlusOutput(NamedTuple):
    """What one forward pass of the model gives for a batch.

    A tuple, because ZeRO-3 hangs its backward hooks on tensors it finds in tuples and dicts, not in dataclasses.
    """

    seg_logits_NQV: torch.Tensor
    """Vocabulary logits at the positions that predict [SEG]."""
    seg_embeds_NQC: torch.Tensor
    """[SEG] embeddings: the prompts of the mask decoder."""
    mask_logits_NQmm: torch.Tensor
    """Low-resolution mask logits."""
    iou_logits_NQ: torch.Tensor | None = None
    """Of the IoU that each mask is expected to reach; None where the model has no head for it."""
