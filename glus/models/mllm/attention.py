"""How the LLM attends: transformers' models call ``attend`` through their ``AttentionInterface``, and keep the keys and
values of prefixes that many prompts share in a ``Cache`` of ours.

Three patterns, each by the fastest kernel that knows it. None needs a matrix of scores except the last:

- tokens that follow each other and all of a prefix: causal;
- packed conversations (``TokenRows``): each is gathered from its row, prefix included, and attends causally;
- prompts whose endings branch off: a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

NAME = "glus"
"""Of the attention function, for transformers' ``attn_implementation``."""
KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one layer: (R, key heads, L, d) each."""


class PackedRows(NamedTuple):
    """The paths of packed rows; see ``TokenRows``."""

    paths_NC: torch.Tensor
    slots_BL: torch.Tensor


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: PackedRows | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend, as an attention function of transformers.

    Args:
        module: the attention layer.
        query: (B, heads, L, d), rotary positions applied.
        key: (B, key heads, A, d); the last L of the A tokens are those of ``query``.
        value: likewise.
        attention_mask: (B, 1, L, A), added to the scores; None: causal.
        dropout: of the attention weights.
        scaling: of the scores; None: 1 / sqrt(d).
        packed: the rows hold these conversations; then A = L, and there is no mask.

    Returns:
        (B, L, heads, d), and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if packed is not None:
        query, key, value = (_gathered(heads, packed.paths_NC) for heads in (query, key, value))
    if attention_mask is None and query.shape[2] < key.shape[2]:
        continued = causal_by_mask if query.device.type == "cpu" else causal_by_padding
        attended = continued(query, key, value, dropout, scaling)
    else:
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            is_causal=attention_mask is None,
            scale=scaling,
        )
    attended = attended.transpose(1, 2)
    if packed is not None:
        slots = packed.slots_BL
        attended = attended.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape)
    return attended, None


def causal_by_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """Attend from the last of the keys' tokens: square causal attention with queries before them that nobody reads.

    It is what every GPU has a fast kernel for (flash), which a mask would rule out.
    """
    length, num_seen = query.shape[2], key.shape[2]
    padded = F.pad(query, (0, 0, num_seen - length, 0))
    attended = F.scaled_dot_product_attention(padded, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return attended[:, :, -length:]


def causal_by_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """The same by a mask, one for all sequences: on a CPU a quarter faster (all of the small model's LLM)."""
    length, num_seen = query.shape[2], key.shape[2]
    hidden = torch.ones(length, num_seen, dtype=torch.bool, device=query.device).triu(num_seen - length + 1)
    mask = torch.zeros(length, num_seen, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def _gathered(heads_BhLd: torch.Tensor, tokens_NL: torch.Tensor) -> torch.Tensor:
    """(N, heads, Lc, d): the tokens of each conversation."""
    tokens = heads_BhLd.transpose(1, 2).flatten(0, 1)  # no copy: so they lie in memory
    return tokens.index_select(0, tokens_NL.flatten()).unflatten(0, tokens_NL.shape).transpose(1, 2)


def additive_mask(sees_BLL: torch.Tensor, num_seen: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the scores of tokens that see ``num_seen`` earlier ones besides: (B, 1, L, num_seen + L)."""
    hidden_BLA = F.pad(~sees_BLL, (num_seen, 0))
    return torch.zeros_like(hidden_BLA, dtype=dtype).masked_fill_(hidden_BLA, -torch.inf)[:, None]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of tokens that later tokens continue, one pair per layer.

    ``rows`` says which of the R rows each later sequence continues: (N,) int64. None: all continue the only row.
    """

    layers: list[KeysValues]
    rows: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[2]

    def of_rows(self, rows: torch.Tensor) -> Prefix:
        """The same prefix for sequences that continue other rows."""
        return Prefix(self.layers, rows)

    def continued(self, layer: int, count: int) -> KeysValues:
        """A layer's keys and values, one row for each of ``count`` sequences."""
        keys, values = self.layers[layer]
        if self.rows is None:
            return keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)


class PrefixCache(Cache):
    """Gives each layer the prefixes' keys and values before the new ones, and stores new ones only to be continued.

    Those of a whole batch of prompts would take four times the memory of all else that reading them takes.

    Args:
        prefixes: the oldest first.
        keep: whether the new tokens are to be continued: ``prefix``.
    """

    def __init__(self, prefixes: Sequence[Prefix], keep: bool):
        super().__init__(layers=[])
        self._new: list[KeysValues] = []
        self._prefixes = prefixes
        self._keep = keep

    @property
    def prefix(self) -> Prefix:
        """The new tokens, to be continued."""
        return Prefix(self._new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        """The layer's keys and values of all tokens, the new ones last."""
        if self._keep:
            self._new.append((key_states, value_states))
        seen = [prefix.continued(layer_idx, len(key_states)) for prefix in self._prefixes]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen, (key_states, value_states), strict=True))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that are continued."""
        return sum(prefix.length for prefix in self._prefixes)
