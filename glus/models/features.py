"""What cached features depend on besides the frame: the key under which they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch

from glus.config import ModelConfig
from glus.models.glus import Glus

VERSION = 1
"""Raised when frames are prepared or encoded in another way."""
KEY_DIGITS = 16
_PREFIXES = {
    "clip": ("mllm.clip.",),
    "sam2": tuple(
        f"segmenter.sam.{part}." for part in ("image_encoder", "sam_mask_decoder.conv_s0", "sam_mask_decoder.conv_s1")
    ),
}
"""Part -> the tensors its features are made with; SAM2's two convolutions belong to the decoder by name alone."""


def feature_keys(glus: Glus, config: ModelConfig, parts: Iterable[str]) -> dict[str, str]:
    """Part -> a hash of its weights, their type, and its settings.

    Features of the same key are equal up to the rounding of the machine that makes them.

    Args:
        glus: built from ``config``, not sharded yet.
        config: of the model.
        parts: ``clip``, ``sam2``.
    """
    tensors = glus.state_dict()
    settings = {
        "clip": [config.clip.architecture, config.clip.select_layer, config.clip.pool],
        "sam2": [config.segmenter.variant, config.segmenter.overrides],
    }
    keys = {}
    for part in parts:
        digest = hashlib.sha256(json.dumps([VERSION, part, settings[part]], sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            if name.startswith(_PREFIXES[part]):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        keys[part] = digest.hexdigest()[:KEY_DIGITS]
    return keys
