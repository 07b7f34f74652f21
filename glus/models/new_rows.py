"""Embeddings and head trained only in the rows of the added tokens: the other rows stay in a frozen table.

The whole tables of a 7 B LLM are 2 x 131 M parameters, each with a gradient and two moments; four rows of each are
2 x 16 k. The released GLUS trains the whole tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class NewRows(nn.Module):
    """A table whose rows ``ids`` are parameters of their own, ``new_rows``; those in ``weight`` are not read.

    Args:
        weight: (V, D) the table; frozen here.
        ids: of the new rows; each differs.
    """

    def __init__(self, weight: nn.Parameter, ids: Sequence[int]):
        super().__init__()
        self.ids = tuple(ids)
        self.weight: nn.Parameter = weight
        self.weight.requires_grad_(False)
        self.new_rows = nn.Parameter(weight.detach()[list(ids)].clone())

    def reset(self) -> None:
        """Take the new rows from the table, which was loaded."""
        self.new_rows = nn.Parameter(self.weight.detach()[list(self.ids)].clone(), self.new_rows.requires_grad)

    def with_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of the table ``weight`` that has the new rows."""
        merged = weight.clone()
        merged[list(self.ids)] = self.new_rows.detach().to(weight)
        return merged


class NewRowsEmbedding(NewRows):
    """Takes the place of an ``nn.Embedding``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., D)."""
        slots = torch.full_like(ids, -1)
        for slot, token in enumerate(self.ids):  # comparisons with numbers: an index tensor would have to be copied
            slots = torch.where(ids == token, slot, slots)
        new = F.embedding(slots.clamp(min=0), self.new_rows)
        return torch.where((slots >= 0)[..., None], new, F.embedding(ids, self.weight))


class NewRowsHead(NewRows):
    """Takes the place of an ``nn.Linear`` without bias."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        logits, new = F.linear(states, self.weight), F.linear(states, self.new_rows)
        for slot, token in enumerate(self.ids):
            logits[..., token] = new[..., slot]
        return logits


def split_embeddings(llama: LlamaForCausalLM, ids: Sequence[int]) -> None:
    """Make the rows ``ids`` of the embedding table parameters of their own, in place."""
    llama.model.embed_tokens = NewRowsEmbedding(llama.model.embed_tokens.weight, ids)  # type: ignore[assignment]


def split_head(llama: LlamaForCausalLM, ids: Sequence[int]) -> None:
    """Make the rows ``ids`` of the head parameters of their own, in place."""
    llama.lm_head = NewRowsHead(llama.lm_head.weight, ids)  # type: ignore[assignment]
