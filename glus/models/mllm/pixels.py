"""Frames as the image processors of transformers make them, in two halves: resized on the CPU, in bytes, and normalised
on the device. Both give the processors' own numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from glus import compat

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of openai/clip-vit-large-patch14's preprocessor_config.json."""


def resized(frame_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with anti-aliasing, as torchvision does it: (h, w, 3) uint8 RGB.

    Args:
        frame_HW3: uint8 RGB.
        size: height and width.
    """
    compat.prepare_torchvision()
    from torchvision.transforms.v2 import functional as vision

    pixels = torch.from_numpy(np.array(frame_HW3)).permute(2, 0, 1)
    bicubic = vision.InterpolationMode.BICUBIC
    return vision.resize(pixels, list(size), interpolation=bicubic, antialias=True).permute(1, 2, 0).numpy()


def normalized(pixels_F3hw: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """``(pixels - 255 mean) / (255 std)`` in float32: the processors' order of operations and rounding.

    Args:
        pixels_F3hw: uint8.
        mean: of each channel, of pixels in [0, 1].
        std: likewise.
    """
    # Numbers, not tensors: copying those to a GPU would wait for it.
    means, stds = (np.array(values, np.float32) * np.float32(255) for values in (mean, std))
    pixels = pixels_F3hw.to(torch.float32)
    channels = [(pixels[:, c] - float(means[c])) / float(stds[c]) for c in range(3)]
    return torch.stack(channels, dim=1)
