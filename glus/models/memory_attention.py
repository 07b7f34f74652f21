"""SAM2's memory attention as GLUS runs it: what does not depend on the reading row or frame is computed once.

A memory is read by up to seven later frames; its keys and values, turned by their place, are the same for all of
them, so they are made when it is stored. What a frame makes of itself before it reads a memory is the same for every
expression, so a frame may come as a single row, which becomes as many as the memories have where they are first read.
Nothing else differs from ``sam2.modeling.memory_attention``, whose modules do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glus.models.memory import FrameMemory, Memory

INPUT_POSITION_SCALE = 0.1
"""Of the position that is added to the frame before the first layer (sam2's ``MemoryAttention.forward``)."""


def project(attention: Any, features_NChw: torch.Tensor, position_1Chw: torch.Tensor) -> FrameMemory:
    """What every layer reads of a memory.

    Args:
        attention: a ``sam2.modeling.memory_attention.MemoryAttention``.
        features_NChw: from the memory encoder.
        position_1Chw: theirs.
    """
    _move_frequencies(attention, features_NChw.device)
    features_NMC, position_1MC = _cells(features_NChw), _cells(position_1Chw)
    layers = []
    for layer in attention.layers:
        cross = layer.cross_attn_image
        placed_NMC = features_NMC + position_1MC if layer.pos_enc_at_cross_attn_keys else features_NMC
        keys_NhMd = _rotated(cross, _heads(cross, cross.k_proj(placed_NMC)))
        layers.append((keys_NhMd, _heads(cross, cross.v_proj(features_NMC))))
    return FrameMemory(tuple(layers))


def attend(
    attention: Any, image_NChw: torch.Tensor, position_1Chw: torch.Tensor, memories: Sequence[Memory]
) -> torch.Tensor:
    """A frame with memories in mind.

    Args:
        attention: a ``sam2.modeling.memory_attention.MemoryAttention``.
        image_NChw: R rows, or 1 row that stands for all.
        position_1Chw: of the frame.
        memories: R rows each; at least one. They are an unordered set, since there is no temporal encoding.

    Returns:
        (R, C, h, w).
    """
    position_1MC, hidden_NMC = _cells(position_1Chw), _cells(image_NChw)
    if attention.pos_enc_at_input:
        hidden_NMC = hidden_NMC + INPUT_POSITION_SCALE * position_1MC
    for number, layer in enumerate(attention.layers):
        normed_NMC = layer.norm1(hidden_NMC)
        placed_NMC = normed_NMC + position_1MC if layer.pos_enc_at_attn else normed_NMC
        hidden_NMC = hidden_NMC + layer.dropout1(layer.self_attn(q=placed_NMC, k=placed_NMC, v=normed_NMC))
        normed_NMC = layer.norm2(hidden_NMC)
        placed_NMC = normed_NMC + position_1MC if layer.pos_enc_at_cross_attn_queries else normed_NMC
        keys, values = zip(*(memory.layer(number) for memory in memories), strict=True)
        read_RMC = _read(layer.cross_attn_image, placed_NMC, torch.cat(keys, dim=2), torch.cat(values, dim=2))
        hidden_NMC = hidden_NMC + layer.dropout2(read_RMC)
        fed_NMC = layer.dropout(layer.activation(layer.linear1(layer.norm3(hidden_NMC))))
        hidden_NMC = hidden_NMC + layer.dropout3(layer.linear2(fed_NMC))
    return attention.norm(hidden_NMC).transpose(1, 2).unflatten(2, image_NChw.shape[2:])


def _read(cross: Any, placed_NMC: torch.Tensor, keys_RhAd: torch.Tensor, values_RhAd: torch.Tensor) -> torch.Tensor:
    """What the cells of a frame find in all A cells of the memories: (R, M, C)."""
    queries_NhMd = _rotated(cross, _heads(cross, cross.q_proj(placed_NMC)))
    # Rows of stride 0 are not what every attention kernel takes.
    queries_RhMd = queries_NhMd.expand(len(keys_RhAd), -1, -1, -1).contiguous()
    dropout = cross.dropout_p if cross.training else 0.0
    read_RhMd = F.scaled_dot_product_attention(queries_RhMd, keys_RhAd, values_RhAd, dropout_p=dropout)
    return cross.out_proj(read_RhMd.transpose(1, 2).flatten(2))


def _cells(map_NChw: torch.Tensor) -> torch.Tensor:
    """(N, h w, C): channels last, as linear layers read them."""
    return map_NChw.flatten(2).transpose(1, 2)


def _heads(cross: Any, projected_NMC: torch.Tensor) -> torch.Tensor:
    return projected_NMC.unflatten(2, (cross.num_heads, -1)).transpose(1, 2)


def _rotated(cross: Any, heads_NhMd: torch.Tensor) -> torch.Tensor:
    """Axial rotary encoding in float32 (Heo et al. 2024): channels 2i and 2i + 1 turn together, half of the pairs by
    the cell's column, half by its row."""
    pairs = torch.view_as_complex(heads_NhMd.float().unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * cross.freqs_cis).flatten(3).to(heads_NhMd.dtype)


def _move_frequencies(attention: Any, device: torch.device) -> None:
    """Move the rotary frequencies, plain tensors in sam2, once: copied in every frame, a GPU would be waited for each
    time. Left to sam2, they would move under inference_mode, and training could not use them afterwards."""
    with torch.inference_mode(False):
        for layer in attention.layers:
            for part in (layer.self_attn, layer.cross_attn_image):
                part.freqs_cis = part.freqs_cis.to(device)
