import numpy as np
import pytest
import torch
from torch.nn import functional

from glus.models.mllm.llava import clip_crop


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (30, 30), (45, 101), (224, 300), (500, 330)])
@pytest.mark.parametrize("side", [56, 224])
def test_crop_is_a_bicubic_resize_and_a_centre_crop(size, side):
    """Against torch's independent resampling, which rounds once where PIL rounds after each axis."""
    frame = np.random.default_rng(0).integers(96, 160, (*size, 3), dtype=np.uint8)  # PIL also clips between the axes
    height, width = (int(side * length / min(size)) for length in size)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = (height - side) // 2, (width - side) // 2
    expected = resized.clamp(0, 255)[0, :, top : top + side, left : left + side].permute(1, 2, 0).numpy()
    crop = clip_crop(frame, side)
    assert (crop.shape, crop.dtype) == ((side, side, 3), np.uint8)
    assert np.abs(crop - expected).max() < 2


def test_the_left_and_right_of_a_wide_frame_are_cut_off():
    frame = np.zeros((20, 60, 3), np.uint8)
    frame[:, 20:40] = 200
    assert (clip_crop(frame, 20) == 200).all()
