"""The conversations of a video as one row of tokens: what they begin with stands there once.

All conversations of a sample start alike: the opening with the context frames, the first query frame, and as much of
the first question as happens to be equal. A language model that looks back only gives these tokens the same states in
each of them, so a row holds them once, then the rest of each conversation::

    row       [shared beginning][rest of 1][rest of 2]...[padding]

Where each conversation's tokens are in the row is all that attention needs (``models/attention.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from glus.batch import Batch, Conversation
from glus.tokens import IMAGE_ID, placeholders

LENGTH_MULTIPLE = 64
"""Rows and conversations are padded to a multiple of it, so that an epoch has few different lengths: kernels and
compiled code that are made for each length are made a few times, and a GPU's tiles are filled."""


@dataclass(frozen=True)
class PackedConversations:
    """Rows of tokens, one per video; the fields are those of ``Batch``."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    placeholders: torch.Tensor
    visual_index: torch.Tensor
    conversation_tokens: torch.Tensor
    token_places: torch.Tensor
    seg_positions: torch.Tensor


def pack_conversations(videos: Sequence[Sequence[Conversation]], pad_id: int) -> PackedConversations:
    """One row per video, padded on the right.

    Args:
        videos: the conversations of each of B videos, all about equally many frames.
        pad_id: token on padding; nothing looks at it.
    """
    counts = {len(placeholders(c.input_ids)) for conversations in videos for c in conversations}
    assert len(counts) == 1, f"conversations of one batch show equally many visual tokens, not {sorted(counts)}"
    (num_visual,) = counts
    rows = [_pack_video(conversations) for conversations in videos]
    length = _padded(max(len(row.input_ids) for row in rows))
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    position_ids = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.input_ids)] = row.input_ids
        position_ids[number, : len(row.input_ids)] = row.position_ids
    tokens = [number * length + own for number, row in enumerate(rows) for own in row.conversations]
    conversation_tokens = np.stack([_filled(own, _padded(max(map(len, tokens)))) for own in tokens])
    visual = [row.visual_index + number * num_visual for number, row in enumerate(rows)]
    return PackedConversations(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        placeholders=torch.from_numpy(placeholders(input_ids)),
        visual_index=torch.from_numpy(np.concatenate(visual)),
        conversation_tokens=torch.from_numpy(conversation_tokens),
        token_places=torch.from_numpy(_places(conversation_tokens, input_ids.size).reshape(input_ids.shape)),
        seg_positions=torch.from_numpy(np.concatenate([row.seg_positions for row in rows])),
    )


def _padded(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _filled(tokens: np.ndarray, length: int) -> np.ndarray:
    """Repeats the last token; attention is causal, so nothing sees the copies."""
    return np.pad(tokens, (0, length - len(tokens)), mode="edge")


def _places(conversation_tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    """(num_tokens,) one place of each token among the conversations; padding, which has none, gets the first."""
    places = np.zeros(num_tokens, np.int64)
    flat = conversation_tokens.ravel()
    places[flat[::-1]] = np.arange(len(flat))[::-1]  # of several places the first is written last, and counts
    return places


@dataclass(frozen=True)
class _Row:
    """A video's row without padding."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    visual_index: np.ndarray
    """Which of the video's visual tokens stands at each placeholder."""
    conversations: list[np.ndarray]
    """Where the tokens of each conversation are."""
    seg_positions: np.ndarray
    """(number of conversations, Q)"""


def _pack_video(conversations: Sequence[Conversation]) -> _Row:
    shared = _shared_length(conversations)
    rests = [c.input_ids[shared:] for c in conversations]
    ends = shared + np.cumsum([0, *(len(rest) for rest in rests)])
    tokens = [np.concatenate([np.arange(shared), np.arange(start, end)]) for start, end in pairwise(ends)]
    shared_visual = len(placeholders(conversations[0].input_ids[:shared]))
    rest_visual = [shared_visual + np.arange((rest == IMAGE_ID).sum()) for rest in rests]
    return _Row(
        np.concatenate([conversations[0].input_ids[:shared], *rests]),
        np.concatenate([np.arange(shared), *(shared + np.arange(len(rest)) for rest in rests)]),
        np.concatenate([np.arange(shared_visual), *rest_visual]),
        tokens,
        np.stack([own[c.seg_positions] for own, c in zip(tokens, conversations, strict=True)]),
    )


def _shared_length(conversations: Sequence[Conversation]) -> int:
    """Number of tokens with which all of them begin; the k-th placeholder shows the same in each."""
    shortest = min(len(c.input_ids) for c in conversations)
    heads = np.stack([c.input_ids[:shortest] for c in conversations])
    differing = np.flatnonzero((heads != heads[0]).any(0))
    return int(differing[0]) if len(differing) else shortest


def unpack_conversations(batch: Batch) -> list[Conversation]:
    """The N conversations of a batch, each whole."""
    conversations = []
    ids = batch.input_ids.flatten().numpy()
    for tokens, video, positions in zip(
        batch.conversation_tokens.numpy(), batch.video_index.tolist(), batch.seg_positions.numpy(), strict=True
    ):
        own = np.unique(tokens)  # ascending; padding repeats the last one
        begin = video * batch.input_ids.shape[1]
        conversations.append(Conversation(ids[own], np.searchsorted(own, begin + positions)))
    return conversations
