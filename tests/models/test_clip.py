"""What the language model sees of a frame."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from glus.models.clip import CLIP_MEAN, CLIP_STD, ClipEncoder


class _Tower(nn.Module):
    """Stands for CLIP: layer l's state of patch p is 100 l + p in every channel, CLS is -1e6; keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=16, patch_size=4, hidden_size=3)
        self.dtype = torch.float32
        self.pixels = torch.zeros(0)

    def forward(self, pixels: torch.Tensor, output_hidden_states: bool) -> Any:
        assert output_hidden_states
        self.pixels = pixels
        patches = torch.cat([torch.tensor([-1e6]), torch.arange(16.0)])[None, :, None].expand(len(pixels), 17, 3)
        return SimpleNamespace(hidden_states=[patches + 100 * layer for layer in range(4)])


@pytest.mark.parametrize(("select_layer", "offset"), [(-1, 300), (-2, 200), (1, 100)])
@pytest.mark.parametrize("pool", [1, 2, 4, 16])
def test_tokens_are_means_of_consecutive_patches_of_the_selected_layer(
    select_layer: int, offset: int, pool: int
) -> None:
    encoder = ClipEncoder(_Tower(), select_layer, pool)  # type: ignore[arg-type]
    tokens = encoder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    expected = torch.arange(16.0).view(-1, pool).mean(1) + offset  # without CLS, in raster order, not 2x2
    assert encoder.tokens_per_frame == 16 // pool
    assert torch.equal(tokens, expected[None, :, None].expand(2, -1, 3))


def test_pixels_are_normalised_as_clip_was_trained() -> None:
    tower = _Tower()
    crops = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ClipEncoder(tower, -2, 4)(crops)  # type: ignore[arg-type]
    mean, std = torch.tensor(CLIP_MEAN).double().view(3, 1, 1), torch.tensor(CLIP_STD).double().view(3, 1, 1)
    torch.testing.assert_close(tower.pixels.double(), (crops.double() / 255 - mean) / std, rtol=0, atol=1e-6)


def test_casting_the_model_does_not_round_the_normalisation() -> None:
    tower = _Tower()
    encoder = ClipEncoder(tower, -2, 4)  # type: ignore[arg-type]
    crops = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder(crops)
    before = tower.pixels
    encoder.to(torch.bfloat16)(crops)
    assert torch.equal(tower.pixels, before)


def test_patches_that_cannot_be_pooled_evenly_are_an_error() -> None:
    with pytest.raises(ValueError, match="pool=3"):
        ClipEncoder(_Tower(), -2, 3)  # type: ignore[arg-type]
