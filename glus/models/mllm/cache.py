"""Keys and values of prefixes that many prompts share, as a ``Cache`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one layer: (R, key heads, L, d) each."""


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
