"""Merging in place and at once, as one writes it first: what ``models.pretrained.merged_tensors`` is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from glus.models.mllm.adapters import NewRows


def merge_lora(llama: Any) -> None:
    """Add every adapter to the projection it adapts (``W += B A alpha / rank``) and take the adapters out, in place.

    Raises:
        ValueError: a projection is quantised; its steps are coarser than what adapters learn.
    """
    from peft.tuners.lora import LoraLayer

    adapters = [(name, module) for name, module in llama.named_modules() if isinstance(module, LoraLayer)]
    for name, adapter in adapters:
        dtype = adapter.get_base_layer().weight.dtype
        if not dtype.is_floating_point:
            raise ValueError(
                f"{name} is stored as {str(dtype).removeprefix('torch.')}: merging would round the adapter away; "
                "load the base model unquantised, then merge"
            )
    for name, adapter in adapters:
        adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(llama.get_submodule(parent), child, adapter.get_base_layer())


def merge_new_rows(llama: Any) -> None:
    """Write the new rows into their tables, which become plain again, in place; without new rows nothing happens."""
    if isinstance(llama.model.embed_tokens, NewRows):
        weight = _merged(llama.model.embed_tokens)
        rows, width = weight.shape
        llama.model.embed_tokens = nn.Embedding(rows, width, llama.config.pad_token_id, device="meta")
        llama.model.embed_tokens.weight = weight
    if isinstance(llama.lm_head, NewRows):
        weight = _merged(llama.lm_head)
        rows, width = weight.shape
        llama.lm_head = nn.Linear(width, rows, bias=False, device="meta")
        llama.lm_head.weight = weight


def _merged(table: NewRows) -> nn.Parameter:
    with torch.no_grad():
        table.weight[list(table.ids)] = table.new_rows
    return table.weight
