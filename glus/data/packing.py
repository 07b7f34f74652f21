"""The conversations of a video as one row of tokens: what they begin with stands there once.

All conversations of a sample start alike: the opening with the context frames, the first query frame, and as much of
the first question as happens to be equal. A language model that looks back only gives these tokens the same states in
each of them, so a row holds them once, then the rest of each conversation::

    row       [shared beginning][rest of 1][rest of 2]...[padding]
    segments   0 0 0 ...         1 1 ...    2 2 ...       -1

``models/packing.py`` turns the segments into positions and attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glus.structures import PADDING_SEGMENT, SHARED_SEGMENT, Batch, Conversation
from glus.tokens import IMAGE_ID


@dataclass(frozen=True)
class PackedConversations:
    """Rows of tokens, one per video; the fields are those of ``Batch``."""

    input_ids: torch.Tensor
    segments: torch.Tensor
    visual_index: torch.Tensor
    seg_positions: torch.Tensor


def pack_conversations(videos: Sequence[Sequence[Conversation]], pad_id: int) -> PackedConversations:
    """One row per video, padded on the right.

    Args:
        videos: the conversations of each of B videos, all about equally many frames.
        pad_id: token on padding; nothing looks at it.
    """
    counts = {int((c.input_ids == IMAGE_ID).sum()) for conversations in videos for c in conversations}
    assert len(counts) == 1, f"conversations of one batch show equally many visual tokens, not {sorted(counts)}"
    (num_visual,) = counts
    rows = [_pack_video(conversations) for conversations in videos]
    length = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    segments = np.full((len(rows), length), PADDING_SEGMENT, np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.input_ids)] = row.input_ids
        segments[number, : len(row.input_ids)] = row.segments
    visual = [row.visual_index + number * num_visual for number, row in enumerate(rows)]
    return PackedConversations(
        input_ids=torch.from_numpy(input_ids),
        segments=torch.from_numpy(segments),
        visual_index=torch.from_numpy(np.concatenate(visual)),
        seg_positions=torch.from_numpy(np.concatenate([row.seg_positions for row in rows])),
    )


@dataclass(frozen=True)
class _Row:
    """A video's row without padding."""

    input_ids: np.ndarray
    segments: np.ndarray
    visual_index: np.ndarray
    """Which of the video's visual tokens stands at each placeholder."""
    seg_positions: np.ndarray
    """(number of conversations, Q)"""


def _pack_video(conversations: Sequence[Conversation]) -> _Row:
    shared = _shared_length(conversations)
    lengths = [shared, *(len(c.input_ids) - shared for c in conversations)]
    rests = [c.input_ids[shared:] for c in conversations]
    visual = [np.cumsum(c.input_ids == IMAGE_ID)[c.input_ids == IMAGE_ID] - 1 for c in conversations]
    shared_visual = int((conversations[0].input_ids[:shared] == IMAGE_ID).sum())
    shifts = np.cumsum(lengths)[:-1] - shared
    return _Row(
        np.concatenate([conversations[0].input_ids[:shared], *rests]),
        np.repeat(np.arange(len(lengths)) + SHARED_SEGMENT, lengths),
        np.concatenate([np.arange(shared_visual), *(index[shared_visual:] for index in visual)]),
        np.stack(
            [
                np.where(c.seg_positions < shared, c.seg_positions, c.seg_positions + shift)
                for c, shift in zip(conversations, shifts, strict=True)
            ]
        ),
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
    for row, video in enumerate(batch.video_index.tolist()):
        number = 1 + int((batch.video_index[:row] == video).sum())
        own = (batch.segments[video] == SHARED_SEGMENT) | (batch.segments[video] == SHARED_SEGMENT + number)
        positions = own.cumsum(0)[batch.seg_positions[row]] - 1
        conversations.append(Conversation(batch.input_ids[video][own].numpy(), positions.numpy()))
    return conversations
