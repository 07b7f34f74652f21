"""LLaMA's layers as inference runs them: tokens that follow others, whose keys and values are kept once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one layer: (R, heads, L, d) each."""


@dataclass(frozen=True)
class Past:
    """Keys and values of tokens that later tokens can look back at, one pair per layer.

    ``rows`` says which of the R rows each later sequence continues; None: all continue the only row.
    """

    layers: list[KeysValues]
    rows: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[2]

    def of_rows(self, rows: torch.Tensor) -> Past:
        """The same past for sequences that continue other rows: (N,) int64."""
        return Past(self.layers, rows)

    def continued(self, layer: int, count: int) -> KeysValues:
        """A layer's keys and values, one row for each of ``count`` sequences."""
        keys, values = self.layers[layer]
        if self.rows is None:
            return keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)
        return keys[self.rows], values[self.rows]


@dataclass(frozen=True)
class Place:
    """Where tokens stand in their conversations."""

    cos_NLd: torch.Tensor
    """Of the rotary angles; d is half a head's width, since a head's two halves turn alike."""
    sin_NLd: torch.Tensor
    mask_NLA: torch.Tensor
    """Added to the attention scores: 0 where a token is seen, -inf where not. Of a bool mask, attention would make
    the same in every layer."""

    def at(self, rows_N1: torch.Tensor, reads_NR: torch.Tensor) -> Place:
        """The places of some of the tokens."""
        return Place(*(part[rows_N1, reads_NR] for part in (self.cos_NLd, self.sin_NLd, self.mask_NLA)))


def read(
    layers: Sequence[Any],
    hidden_NLD: torch.Tensor,
    place: Place,
    past: Sequence[Past],
    reads_NR: torch.Tensor | None,
) -> tuple[torch.Tensor | None, Past]:
    """Run LLaMA's layers over new tokens; the last one only where states are read.

    The layers' own modules do the projections (adapters and quantised weights included); what lies between is done
    in fewer passes over memory than transformers' layers take, in place where nothing else holds the tensor.

    Args:
        layers: of class ``transformers.models.llama.modeling_llama.LlamaDecoderLayer``.
        hidden_NLD: embeddings of the new tokens.
        place: theirs.
        past: what the N sequences continue, the oldest first.
        reads_NR: int64, the new tokens whose states are wanted; None: none.

    Returns:
        States before the final norm (N, R, D) or None, and keys and values of the new tokens alone.
    """
    new: list[KeysValues] = []
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        normed_NLD = rms_norm(layer.input_layernorm, hidden_NLD)
        keys, values = (
            _heads(projection(normed_NLD), attention.head_dim) for projection in (attention.k_proj, attention.v_proj)
        )
        new.append((_rotated(keys, place), values))
        if number == len(layers) - 1:
            if reads_NR is None:
                return None, Past(new)
            rows_N1 = torch.arange(len(reads_NR), device=reads_NR.device)[:, None]
            hidden_NLD, normed_NLD = hidden_NLD[rows_N1, reads_NR], normed_NLD[rows_N1, reads_NR]
            place = place.at(rows_N1, reads_NR)
        seen = [one.continued(number, len(hidden_NLD)) for one in past]
        attended_NLD = _attend(attention, normed_NLD, place, [*seen, new[-1]])
        hidden_NLD = attended_NLD.add_(hidden_NLD)
        normed_NLD = rms_norm(layer.post_attention_layernorm, hidden_NLD)
        hidden_NLD = _feed_forward(layer.mlp, normed_NLD).add_(hidden_NLD)
    return hidden_NLD, Past(new)


def rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' ``LlamaRMSNorm`` in one pass; in bfloat16 it rounds once, at the end."""
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _heads(projected_NLD: torch.Tensor, width: int) -> torch.Tensor:
    return projected_NLD.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotated(heads_NhLd: torch.Tensor, place: Place) -> torch.Tensor:
    """Rotary position encoding (Su et al. 2021), channel i turned together with channel i + d / 2 as LLaMA has it."""
    first, second = heads_NhLd.chunk(2, dim=-1)
    cos, sin = place.cos_NLd[:, None], place.sin_NLd[:, None]
    rotated = torch.empty_like(heads_NhLd)
    into_first, into_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=into_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=into_second).addcmul_(first, sin)
    return rotated


def _attend(attention: Any, normed_NLD: torch.Tensor, place: Place, seen: Sequence[KeysValues]) -> torch.Tensor:
    """What attention adds to the states of tokens that look at ``seen``, the newest tokens themselves included."""
    queries_NhLd = _rotated(_heads(attention.q_proj(normed_NLD), attention.head_dim), place)
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
    if attention.num_key_value_groups > 1:
        keys, values = (part.repeat_interleave(attention.num_key_value_groups, dim=1) for part in (keys, values))
    attended_NhLd = F.scaled_dot_product_attention(queries_NhLd, keys, values, attn_mask=place.mask_NLA[:, None])
    return attention.o_proj(attended_NhLd.transpose(1, 2).flatten(2))


def _feed_forward(mlp: Any, normed_NLD: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed_NLD)).mul_(mlp.up_proj(normed_NLD)))
