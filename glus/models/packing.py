"""Where the tokens of packed conversations stand and what they see: as if each conversation had a row of its own."""

from __future__ import annotations

import torch

from glus.structures import PADDING_SEGMENT, SHARED_SEGMENT


def packed_positions(segments_BL: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own conversation: the rest of each follows the shared beginning.

    Args:
        segments_BL: int64, see ``structures.Batch.segments``.

    Returns:
        (B, L) int64; that of padding has no meaning.
    """
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    is_start_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    is_start_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    start_BL = (place_L * is_start_BL).cummax(1).values
    shared_B1 = (segments_BL == SHARED_SEGMENT).sum(1, keepdim=True)
    return place_L - start_BL + shared_B1 * (segments_BL > SHARED_SEGMENT)


def packed_attention(segments_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the attention scores: 0 where a token may look, minus infinity elsewhere.

    A token looks back at the shared beginning and at its own segment. Padding sees itself, so that no row of scores
    is empty, and nothing else sees padding.

    Args:
        segments_BL: int64, see ``structures.Batch.segments``.
        dtype: of the scores.

    Returns:
        (B, 1, L, L), query by key; the 1 stands for all heads.
    """
    query_BL1, key_B1L = segments_BL[:, :, None], segments_BL[:, None, :]
    is_shared_B1L = key_B1L == SHARED_SEGMENT
    seen_BLL = (query_BL1 == key_B1L) | (is_shared_B1L & (query_BL1 != PADDING_SEGMENT))
    hidden_BLL = ~seen_BLL.tril()
    return torch.zeros(hidden_BLL.shape, dtype=dtype, device=segments_BL.device).masked_fill_(hidden_BLL, -torch.inf)[
        :, None
    ]
