"""The CLIP vision tower: uint8 crops in, pooled patch features out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from glus import compat

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of openai/clip-vit-large-patch14's preprocessor_config.json."""


def build_vision_tower(architecture: dict[str, Any]) -> CLIPVisionModel:
    """A CLIP vision model with random weights.

    Args:
        architecture: fields of ``transformers.CLIPVisionConfig``.
    """
    compat.prepare_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**architecture))


class ClipEncoder(nn.Module):
    """CLIP patch features, averaged over runs of ``pool`` consecutive patches.

    The pooling is one-dimensional over the raster sequence, before the projector, as in the released GLUS
    (``AvgPool1d`` in llava_arch.py); with 16 patches a row and ``pool=4`` a token is a quarter of a row.

    Args:
        vision_model: the tower.
        select_layer: index into its ``hidden_states``; the layers after it have weights but are not run.
        pool: patches per visual token.

    Raises:
        ValueError: there is no such layer, or the number of patches is not a multiple of ``pool``.
    """

    def __init__(self, vision_model: CLIPVisionModel, select_layer: int, pool: int):
        super().__init__()
        self.vision_model = vision_model
        self.select_layer = select_layer
        num_layers = len(vision_model.encoder.layers)
        if not -num_layers - 1 <= select_layer <= num_layers:
            raise ValueError(f"model.clip.select_layer={select_layer}: the tower has {num_layers} layers")
        self.num_run = select_layer % (num_layers + 1)
        """Layers that are run: ``hidden_states`` begins with the state before the first."""
        self.pool = pool
        config: Any = vision_model.config  # its sizes may be tuples elsewhere; CLIP's are numbers
        self.image_size: int = config.image_size
        self.width: int = config.hidden_size
        num_patches = (config.image_size // config.patch_size) ** 2
        if num_patches % pool:
            raise ValueError(
                f"model.clip.pool={pool}: {num_patches} patches a frame cannot be split into runs of {pool}"
            )
        self.tokens_per_frame = num_patches // pool

    def forward(self, crops_FCss: torch.Tensor) -> torch.Tensor:
        """Features of frames.

        Args:
            crops_FCss: (F, 3, s, s) uint8, RGB.

        Returns:
            (F, P, width) in the tower's dtype.
        """
        # Numbers, not buffers: casting the model to bfloat16 would round them by up to 0.2 %. Not tensors made here
        # either: copying them to a GPU would wait for it.
        scaled = crops_FCss.to(torch.float32) * (1 / 255)
        channels = [(scaled[:, c] - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)]
        pixels = torch.stack(channels, dim=1)
        tower = self.vision_model
        states = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.dtype)))
        for layer in tower.encoder.layers[: self.num_run]:
            states = layer(states, attention_mask=None)
        patches = states[:, 1:]  # without CLS
        return F.avg_pool1d(patches.transpose(1, 2), self.pool, self.pool).transpose(1, 2)
