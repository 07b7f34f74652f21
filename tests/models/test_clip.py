"""What the language model sees of a frame."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from glus.models.mllm.llava import ClipEncoder, build_vision_tower
from glus.models.mllm.pixels import CLIP_MEAN, CLIP_STD


class _Layer(nn.Module):
    def forward(self, states: torch.Tensor, attention_mask: None) -> torch.Tensor:
        return states + 100


class _Tower(nn.Module):
    """Stands for CLIP: layer l's state of patch p is 100 l + p in every channel, CLS is -1e6; keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=16, patch_size=4, hidden_size=3)
        self.dtype = torch.float32
        self.pre_layrnorm = nn.Identity()
        self.encoder = SimpleNamespace(layers=nn.ModuleList([_Layer(), _Layer(), _Layer()]))
        self.pixels = torch.zeros(0)

    def embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        self.pixels = pixels
        return torch.cat([torch.tensor([-1e6]), torch.arange(16.0)])[None, :, None].expand(len(pixels), 17, 3)


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


@pytest.mark.parametrize("select_layer", [-1, -2, 0, 2])
def test_layers_after_the_selected_one_are_not_run(select_layer: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = build_vision_tower({**sizes, "image_size": 16, "patch_size": 4})
    run: list[int] = []
    for number, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    encoder = ClipEncoder(tower, select_layer, 1)
    crops = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = encoder(crops)
    assert run == list(range({-1: 3, -2: 2, 0: 0, 2: 2}[select_layer]))
    pixels = (crops / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    states = tower(pixels, output_hidden_states=True).hidden_states[select_layer]
    torch.testing.assert_close(tokens, states[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("select_layer", [-5, 4])
def test_a_layer_that_is_not_there_is_an_error(select_layer: int) -> None:
    with pytest.raises(ValueError, match=f"select_layer={select_layer}: the tower has 3 layers"):
        ClipEncoder(_Tower(), select_layer, 4)  # type: ignore[arg-type]


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
