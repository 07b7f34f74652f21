"""What happens to a frame on the CPU: the uint8 part of CLIP's preprocessing.

Scaling to [0, 1] and normalisation, and SAM2's resize of the whole frame, happen later on the device.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def clip_crop(frame_HW3: np.ndarray, size: int) -> np.ndarray:
    """The centre square that CLIP sees: bicubic resize of the shorter edge to ``size``, then a centre crop.

    The left and right of a wide frame never reach the language model. Equal to ``CLIPImageProcessor`` (its PIL
    form) of openai/clip-vit-large-patch14, before its rescaling: the long edge becomes ``int(size * long / short)``.

    Args:
        frame_HW3: (H, W, 3) uint8 RGB.
        size: side of CLIP's input in pixels.

    Returns:
        (size, size, 3) uint8 RGB.
    """
    height, width = frame_HW3.shape[:2]
    short, long = min(height, width), max(height, width)
    new_long = int(size * long / short)
    new_height, new_width = (size, new_long) if height <= width else (new_long, size)
    resized = Image.fromarray(frame_HW3).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
