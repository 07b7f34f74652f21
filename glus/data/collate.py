"""Samples -> one batch: rows of expressions pointing at rows of videos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from glus.data.packing import pack_conversations
from glus.structures import Batch, Conversation, TrainSample
from glus.tokens import placeholders


def collate(samples: Sequence[TrainSample], pad_id: int) -> Batch:
    """The samples as one batch; the conversations of each video are packed into one row.

    Args:
        samples: B videos with equal numbers of context and query frames.
        pad_id: token on padding; attention never reaches it.
    """
    rows = [row for row, sample in enumerate(samples) for _ in sample.conversations]
    return Batch(
        context_clip=_channels_first([sample.context_clip for sample in samples]),
        query_clip=_channels_first([sample.query_clip for sample in samples]),
        query_frames=[torch.as_tensor(sample.query_frames) for sample in samples],
        **vars(pack_conversations([sample.conversations for sample in samples], pad_id)),
        video_index=torch.tensor(rows, dtype=torch.int64),
        target_masks=[torch.from_numpy(mask) for sample in samples for mask in sample.target_masks],
        object_keys=[keys for sample in samples for keys in sample.object_keys],
        names=[name for sample in samples for name in sample.names],
    )


def pad_conversations(
    conversations: Sequence[Conversation], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Conversations as rows of equal length, padded on the right.

    Args:
        conversations: N of them, each with equally many [SEG].
        pad_id: token on padding; attention never reaches it.

    Returns:
        (N, L) int64 ids, (M,) int64 placeholders counted through the rows, and (N, Q) int64 positions before each
        [SEG].
    """
    longest = max(len(conversation.input_ids) for conversation in conversations)
    input_ids = np.full((len(conversations), longest), pad_id, np.int64)
    for row, conversation in zip(input_ids, conversations, strict=True):
        row[: len(conversation.input_ids)] = conversation.input_ids
    seg_positions = np.stack([conversation.seg_positions for conversation in conversations])
    ids, where, positions = (torch.from_numpy(part) for part in (input_ids, placeholders(input_ids), seg_positions))
    return ids, where, positions


def _channels_first(crops: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
    """B arrays (F, s, s, 3) -> (B, F, 3, s, s); cached features (F, P, width) -> (B, F, P, width)."""
    frames = torch.stack([torch.as_tensor(crop) for crop in crops])
    return frames if frames.is_floating_point() else frames.permute(0, 1, 4, 2, 3).contiguous()
