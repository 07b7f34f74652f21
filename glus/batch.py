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
``C``  width of the segmenter
``S``  side of SAM2's square input; ``m = S / 4`` is the side of its mask logits
``T``  frames of a video
``V``  vocabulary
``E``  expressions of one video at inference
``H W`` height and width of the original frames
====== ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from glus.types import ObjectKey


@dataclass(frozen=True)
class Conversation:
    """A tokenised conversation, images already expanded to their placeholders."""

    input_ids: np.ndarray
    """(L,) int64; each image is ``P`` times ``tokens.IMAGE_ID``."""
    seg_positions: np.ndarray
    """(Q,) int64: the position *before* each [SEG], whose state predicts it and, as released, is its embedding."""
    axes_L3: np.ndarray | None = None
    """int64: time, row and column of each token, for families that count these; None: tokens are counted."""
    is_read_at_seg: bool = False
    """Whether the states of the [SEG] themselves are wanted too: their embeddings, with ``model.seg_state=at``."""

    @property
    def positions(self) -> np.ndarray:
        """(L,) or (L, 3) int64."""
        return np.arange(len(self.input_ids)) if self.axes_L3 is None else self.axes_L3

    @property
    def reads(self) -> np.ndarray:
        """int64: tokens whose states are wanted, (Q,), or (2 Q,) where each is followed by its [SEG]."""
        if not self.is_read_at_seg:
            return self.seg_positions
        return np.stack([self.seg_positions, self.seg_positions + 1], axis=1).ravel()


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens for the LLM, each a tree: what several conversations or prompts begin with stands there once.

    A conversation is a *path* through its row, along which attention is causal. Of ``paths_NC`` and ``sees_BLL``, two
    forms of the same knowledge, at most one is given; without either every row is one path.
    """

    input_ids_BL: torch.Tensor
    """int64, ``tokens.IMAGE_ID`` where a visual token goes; right-padded."""
    position_ids_BL: torch.Tensor
    """int64: position of each token in its own conversation, (B, L, 3) where it has three; 0 on padding."""
    placeholders_M: torch.Tensor
    """int64: where visual tokens go, counted through the rows. Given, not looked for: a number of tokens that depends
    on values would be waited for on a GPU."""
    visual_index_M: torch.Tensor
    """int64: which visual token stands at each placeholder."""
    reads_R: torch.Tensor
    """int64: tokens whose states are wanted, counted through the rows."""
    paths_NC: torch.Tensor | None = None
    """int64: the tokens of each path, counted through the rows; the last one again on padding."""
    slots_BL: torch.Tensor | None = None
    """int64, with ``paths_NC``: a slot of each token there, counted through; any slot on padding."""
    sees_BLL: torch.Tensor | None = None
    """bool: which tokens of its row each token attends to; at least one."""

    def to(self, device: torch.device | str) -> TokenRows:
        """The same rows on ``device``."""
        return _each(self, lambda tensor: to_device(tensor, device))


@dataclass
class TrainSample:
    """One video with its drawn frames and sentences, before collation (CPU)."""

    context_pixels: np.ndarray
    """(K, h, w, 3) uint8: the context frames as ``Mllm.prepare`` gives them."""
    query_pixels: np.ndarray
    """(Q, h, w, 3) uint8: the query frames, likewise."""
    query_frames: np.ndarray
    """(Q, H, W, 3) uint8 RGB: the query frames whole, for the segmenter."""
    conversations: list[Conversation]
    """One per expression."""
    target_masks: list[np.ndarray]
    """One (Q, H, W) uint8 array of 0/1 per expression."""
    object_keys: list[list[ObjectKey]] = field(default_factory=list)
    """Q keys per expression."""
    names: list[str] = field(default_factory=list)
    """``Expression.name`` of each expression."""


@dataclass
class Batch:
    """Rows of expressions pointing at rows of videos; each frame of a video, and what its conversations begin with,
    is held once."""

    context_pixels: list[torch.Tensor]
    """B tensors (K, 3, h, w) uint8: what the MLLM sees."""
    query_pixels: list[torch.Tensor]
    """B tensors (Q, 3, h, w) uint8."""
    query_frames: list[torch.Tensor]
    """B tensors (Q, H, W, 3) uint8; the segmenter's resize happens on the device."""
    rows: TokenRows
    """One row per video: what all its conversations begin with, then the rest of each. Its visual tokens are the
    videos', context before query frames; read are N * Q positions before each [SEG] (see ``Conversation.reads``)."""
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
        return sum(len(masks) for masks in self.target_masks)

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        sizes: list[int] = []
        _each(self, lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
        return sum(sizes)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        return _each(self, lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which ``to`` copies while the GPU works; a DataLoader calls it."""
        return _each(self, lambda tensor: tensor.pin_memory())


Rows = TypeVar("Rows", TokenRows, Batch)


def _each(holder: Rows, change: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
    """The same with every tensor changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, TokenRows):
            return _each(value, change)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [change(tensor) for tensor in value]
        return value

    return type(holder)(**{name: changed(value) for name, value in vars(holder).items()})


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
    mask_iou_NQ: torch.Tensor | None = None
    """What the mask decoder itself expects each mask to reach."""
    object_logits_NQ: torch.Tensor | None = None
    """Of whether the decoder sees the object at all."""


def to_device(values: torch.Tensor | np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The values there; to a GPU through page-locked memory, from which they are copied while other work goes on."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.require(values, requirements=["C", "W"]))  # copies where it must
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A tensor that will be complete on the CPU once the device has done what it was given to do until now."""
    if values.device.type != "cuda":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def row_index(rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of rows on the device: (len(rows),) int64. A GPU need not be idle for it, as it is for a list."""
    return torch.from_numpy(np.array(rows, np.int64)).to(device, non_blocking=True)
