"""SAM2's verbs, and that it can be built wherever Hydra stands."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from glus.models.segmenter import sam2
from glus.models.segmenter.sam2 import (
    SAM2_MEAN,
    SAM2_STD,
    FrameFeatures,
    Sam2Segmenter,
    build_sam2,
    stability_scores,
)

VARIANTS = [f"{family}_hiera_{size}" for family in ("sam2", "sam2.1") for size in ("t", "s", "b+", "l")]


@pytest.fixture
def segmenter(glus: Glus) -> Sam2Segmenter:
    return glus.segmenter


@pytest.fixture(scope="session")
def overrides(tiny_model: LoadedModel) -> dict[str, Any]:
    return tiny_model.config.model.segmenter.overrides


def _frames(count: int = 2, height: int = 40, width: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def _features(segmenter: Sam2Segmenter, count: int = 2) -> FrameFeatures:
    return segmenter.encode_frames(segmenter.prepare_frames(_frames(count)))


def _prompts(segmenter: Sam2Segmenter, count: int = 2) -> torch.Tensor:
    return torch.randn(count, segmenter.width, generator=torch.Generator().manual_seed(1))


def _encoded(segmenter: Sam2Segmenter, count: int) -> list[torch.Tensor]:
    """Of two rows, from random masks."""
    conditioned = segmenter.condition(_features(segmenter), None)
    generator = torch.Generator().manual_seed(2)
    return [segmenter.memorize(conditioned, 5 * torch.randn(2, 16, 16, generator=generator)) for _ in range(count)]


def _memories(segmenter: Sam2Segmenter, count: int) -> torch.Tensor:
    """What is read of them: (2, count, C_mem, h, w)."""
    return torch.stack(_encoded(segmenter, count), dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds_at_any_size(variant: str, overrides: dict[str, Any]) -> None:
    small = {**overrides, "image_encoder.trunk.window_spec": [8, 4, 14, 7]}
    segmenter = Sam2Segmenter(build_sam2(variant, small), multimask_fallback=False).eval()
    decoded = segmenter.decode(segmenter.condition(_features(segmenter), None), _prompts(segmenter))
    assert decoded.logits_Nmm.shape == (2, 16, 16)


def test_an_unknown_variant_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'sam3'.*sam2\.1_hiera_b\+.*sam2_hiera_t"):
        build_sam2("sam3", {})


@pytest.mark.parametrize("key", ["image_encoder.trunk.embed_dimension", "memory_atention.d_model"])
def test_an_override_that_no_part_takes_is_an_error(key: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"(?s)overrides do not fit sam2_hiera_t.*{key.split('.')[0]}"):
        build_sam2("sam2_hiera_t", {**overrides, key: 8})


def test_rotary_encodings_fit_the_image_size_from_the_start(overrides: dict[str, Any]) -> None:
    """Else the first pass would make them, under inference_mode as tensors that training cannot use."""
    stated = {key: value for key, value in overrides.items() if not key.endswith("feat_sizes")}
    segmenter = Sam2Segmenter(build_sam2("sam2_hiera_t", stated), False, memory_gradient=True).eval()
    with torch.inference_mode():
        segmenter.condition(_features(segmenter), _memories(segmenter, 1))
    image = _features(segmenter)
    leaf = image.image_NChw.detach().requires_grad_()
    segmenter.condition(replace(image, image_NChw=leaf), _memories(segmenter, 2)).image_NChw.sum().backward()
    assert leaf.grad is not None


HYDRA_SCRIPT = """
import sys
from hydra.core.global_hydra import GlobalHydra
from glus.models.segmenter.sam2 import build_sam2

overrides = {overrides!r}

def build():
    assert build_sam2("sam2_hiera_t", overrides).image_size == 64

assert not GlobalHydra.instance().is_initialized()
build()
build()
assert not GlobalHydra.instance().is_initialized()
"""

HYDRA_APP = """
import hydra

@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg):
    before = GlobalHydra.instance().hydra
    build()
    assert GlobalHydra.instance().hydra is before
    print("built", cfg.answer)

sys.argv = ["app", "+answer=42", "hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
main()
"""


def test_it_builds_with_and_without_an_initialised_hydra(overrides: dict[str, Any], tmp_path: Path) -> None:
    """From another working directory, twice, first alone and then inside an application."""
    script = tmp_path / "app.py"
    script.write_text(HYDRA_SCRIPT.format(overrides=overrides) + HYDRA_APP)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "built 42" in done.stdout


def test_frames_are_squashed_to_a_square_with_antialiasing(segmenter: Sam2Segmenter) -> None:
    frames = _frames(1, 100, 160)
    mean, std = torch.tensor(SAM2_MEAN).view(3, 1, 1), torch.tensor(SAM2_STD).view(3, 1, 1)
    resized = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2) / 255, (64, 64), mode="bilinear", align_corners=False, antialias=True
    )
    expected = (resized - mean) / std
    torch.testing.assert_close(segmenter.prepare_frames(frames), expected, rtol=0, atol=1e-6)
    low = segmenter.to(torch.bfloat16).prepare_frames(frames)
    assert torch.equal(low, expected)  # neither rounded constants nor a resize in bfloat16


def test_a_plain_colour_keeps_its_value(segmenter: Sam2Segmenter) -> None:
    frame = torch.tensor([255, 0, 51], dtype=torch.uint8).expand(1, 30, 50, 3)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(SAM2_MEAN)) / torch.tensor(SAM2_STD)
    prepared = segmenter.prepare_frames(frame)
    torch.testing.assert_close(prepared, expected.view(1, 3, 1, 1).expand(1, 3, 64, 64), rtol=0, atol=1e-5)


def test_dense_position_is_sam2s_own(segmenter: Sam2Segmenter) -> None:
    expected = segmenter.sam.sam_prompt_encoder.get_dense_pe()
    torch.testing.assert_close(_features(segmenter).dense_position_1Chw, expected, rtol=0, atol=1e-6)
    low = _features(segmenter.to(torch.bfloat16)).dense_position_1Chw
    assert low.dtype is torch.bfloat16
    assert low.shape == expected.shape
    assert torch.isfinite(low).all()


def test_a_small_mask_is_prompted_as_a_click_on_it(segmenter: Sam2Segmenter) -> None:
    """One cell of the mask grid, so one position; SAM2 adds half a pixel to a click's whole-pixel coordinates."""
    encoder, side = segmenter.sam.sam_prompt_encoder, segmenter.image_size
    masks = torch.zeros(3, 32, 48, dtype=torch.uint8)
    masks[0, 2:4, 3:6] = 1  # of a 16x16 grid: row 1, column 1
    masks[1, 30:32, 45:48] = 1  # the last cell
    points = torch.tensor([[1.5 / 16, 1.5 / 16], [15.5 / 16, 15.5 / 16]])
    clicks, _ = encoder(
        points=(points[:, None] * side - 0.5, torch.ones(2, 1, dtype=torch.int32)), boxes=None, masks=None
    )
    prompts = segmenter.mask_prompt(masks)
    torch.testing.assert_close(prompts[:2], clicks[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(prompts[2], clicks[0, 1], rtol=0, atol=0)  # empty: SAM2's padding point


def test_the_prompt_of_any_mask_is_finite_and_as_long_as_a_clicks(segmenter: Sam2Segmenter) -> None:
    masks = torch.stack([torch.ones(40, 56), torch.zeros(40, 56), (torch.rand(40, 56) > 0.9).float()])
    prompts = segmenter.mask_prompt(masks)
    lengths = (prompts - segmenter.sam.sam_prompt_encoder.point_embeddings[1].weight).norm(dim=1)
    torch.testing.assert_close(lengths[[0, 2]], torch.full((2,), (segmenter.width / 2) ** 0.5), rtol=1e-4, atol=0)
    assert torch.isfinite(segmenter.to(torch.bfloat16).mask_prompt(masks).float()).all()


def test_without_memories_the_no_memory_embedding_is_added(segmenter: Sam2Segmenter) -> None:
    frame = _features(segmenter)
    conditioned = segmenter.condition(frame, None)
    expected = frame.image_NChw + segmenter.sam.no_mem_embed.view(1, -1, 1, 1)
    assert torch.equal(conditioned.image_NChw, expected)
    assert conditioned.high_NChw is frame.high_NChw


def test_memories_are_an_unordered_set(segmenter: Sam2Segmenter) -> None:
    frame, memories = _features(segmenter), _memories(segmenter, 3)
    forward = segmenter.condition(frame, memories).image_NChw
    torch.testing.assert_close(
        segmenter.condition(frame, memories[:, [2, 0, 1]]).image_NChw, forward, rtol=0, atol=1e-6
    )
    assert (segmenter.condition(frame, memories[:, :2]).image_NChw - forward).abs().max() > 1e-5


def _cells(maps_NChw: torch.Tensor) -> torch.Tensor:
    """Two rows of maps as SAM2's own attention takes them: (cells, rows, channels)."""
    rows = [[maps[:, y, x] for y in range(4) for x in range(4)] for maps in maps_NChw.expand(2, -1, -1, -1)]
    return torch.stack([torch.stack(row) for row in rows], dim=1)


@pytest.mark.parametrize("switched", ["", "input", "attn", "cross_attn_queries", "cross_attn_keys"])
@pytest.mark.parametrize("training", [False, True])
def test_memories_are_read_as_sam2s_own_attention_reads_them(
    overrides: dict[str, Any], switched: str, training: bool
) -> None:
    """Two layers and two heads; with dropout in training; with any of SAM2's switches of positions the other way."""
    layer = "memory_attention.layer"
    stated: dict[str, Any] = {
        **overrides,
        "memory_attention.num_layers": 2,
        f"{layer}.cross_attention.num_heads": 2,
        **{f"{layer}.{part}dropout": 0.1 for part in ("", "self_attention.", "cross_attention.")},
    }
    torch.manual_seed(0)
    segmenter = Sam2Segmenter(build_sam2("sam2_hiera_t", stated), multimask_fallback=False).train(training)
    attention = segmenter.sam.memory_attention
    for module in (attention, *attention.layers):
        if hasattr(module, f"pos_enc_at_{switched}"):
            setattr(module, f"pos_enc_at_{switched}", not getattr(module, f"pos_enc_at_{switched}"))
    frame, encoded = _features(segmenter), _encoded(segmenter, 3)
    memories = torch.stack(encoded, dim=1)
    torch.manual_seed(1)
    expected = attention(
        curr=_cells(frame.image_NChw),
        curr_pos=_cells(frame.position_1Chw),
        memory=torch.cat([_cells(memory) for memory in encoded]),
        memory_pos=torch.cat([_cells(segmenter.memory_position(memory)).expand(-1, 2, -1) for memory in encoded]),
    )
    torch.manual_seed(1)
    conditioned = segmenter.condition(frame, memories)
    torch.testing.assert_close(_cells(conditioned.image_NChw), expected, rtol=0, atol=1e-6)
    assert segmenter.memory_position(encoded[0]).std() > 0.1


def test_many_frames_are_encoded_in_parts(segmenter: Sam2Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of all frames are rows of one batch, of which CUDA takes 65,535."""
    expected = _features(segmenter, 5)
    taken: list[int] = []
    segmenter.sam.image_encoder.register_forward_pre_hook(lambda _, inputs: taken.append(len(inputs[0])))
    monkeypatch.setattr(sam2, "MAX_ENCODED", 2)
    parted = _features(segmenter, 5)
    assert taken == [2, 2, 1]
    for got, wanted in zip(
        (*parted.high_NChw, parted.image_NChw), (*expected.high_NChw, expected.image_NChw), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert torch.equal(parted.position_1Chw, expected.position_1Chw)


def test_a_frame_of_one_row_stands_for_every_row(segmenter: Sam2Segmenter) -> None:
    frame, prompts = _features(segmenter).frame(1), _prompts(segmenter)
    for memories in (None, _memories(segmenter, 2)):
        one = segmenter.condition(frame, memories)
        each = segmenter.condition(frame.rows([0, 0]), memories)
        decoded, expected = segmenter.decode(one, prompts), segmenter.decode(each, prompts)
        torch.testing.assert_close(decoded.all_logits_N4mm, expected.all_logits_N4mm, rtol=0, atol=1e-5)
        encoded, its_expected = (segmenter.memorize(seen, decoded.logits_Nmm) for seen in (one, each))
        torch.testing.assert_close(encoded, its_expected, rtol=0, atol=1e-5)


def test_memory_is_soft_and_made_of_the_conditioned_feature(segmenter: Sam2Segmenter) -> None:
    conditioned = segmenter.condition(_features(segmenter), None)
    logits = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))
    base = segmenter.memorize(conditioned, logits)
    mask = torch.nn.functional.interpolate(logits[:, None], (64, 64), mode="bilinear", align_corners=False)
    expected = segmenter.sam.memory_encoder(
        conditioned.image_NChw, torch.sigmoid(mask) * 20 - 10, skip_mask_sigmoid=True
    )["vision_features"]
    assert torch.equal(base, expected)
    assert (segmenter.memorize(conditioned, 3 * logits) - base).abs().max() > 1e-4  # same signs
    raw = replace(conditioned, image_NChw=conditioned.image_NChw + 1)
    assert (segmenter.memorize(raw, logits) - base).abs().max() > 1e-4


def test_stability_is_the_share_of_area_that_survives() -> None:
    logits = torch.full((3, 10, 10), -1.0)
    logits[0, :2] = 1.0  # 20 pixels far inside
    logits[0, 2, :5] = 0.0  # and 5 within the margin
    logits[1, 0, 0] = -0.04  # only within the margin
    torch.testing.assert_close(stability_scores(logits), torch.tensor([0.8, 0.0, 1.0]))


def _decode_with(segmenter: Sam2Segmenter, logits: torch.Tensor, iou: torch.Tensor, fallback: bool) -> Any:
    """``decode`` where SAM2's decoder answers ``logits`` and ``iou``."""
    segmenter.sam.sam_mask_decoder.predict_masks = lambda **_: (logits, iou, None, torch.zeros(len(logits), 1))
    return segmenter.decode(_features(segmenter, len(logits)), _prompts(segmenter, len(logits)), fallback)


def test_an_unstable_mask_gives_way_to_the_best_alternative(segmenter: Sam2Segmenter) -> None:
    logits = torch.stack([torch.full((4, 16, 16), 5.0), torch.full((4, 16, 16), 5.0)])
    logits[:, 1:] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    logits[0, 0, 0, :5] = 0.0  # 251 of 256 pixels are stable: 0.9805, above the threshold
    logits[1, 0, 0, :6] = 0.0  # 250 of 256: 0.9766, below
    iou = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.99, 0.1, 0.5, 0.3]])
    decoded = _decode_with(segmenter, logits, iou, fallback=True)
    assert decoded.used_multimask_N.tolist() == [False, True]
    assert torch.equal(decoded.logits_Nmm, torch.stack([logits[0, 0], logits[1, 2]]))  # not the single mask's 0.99
    without = _decode_with(segmenter, logits, iou, fallback=False)
    assert torch.equal(without.logits_Nmm, logits[:, 0])
    assert not without.used_multimask_N.any()


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_parts_build_no_graph(segmenter: Sam2Segmenter, trained: bool) -> None:
    segmenter.requires_grad_(False)
    segmenter.sam.memory_encoder.requires_grad_(trained)
    segmenter.note_trained()
    assert not _features(segmenter).image_NChw.requires_grad
    (memory,) = _encoded(segmenter, 1)
    assert not memory.requires_grad  # its history is cut
    segmenter.sam.image_encoder.requires_grad_(trained)
    segmenter.note_trained()
    assert _features(segmenter).image_NChw.requires_grad is trained


def test_memory_gradient_flows_through_frozen_modules(segmenter: Sam2Segmenter) -> None:
    segmenter.requires_grad_(False)
    segmenter.note_trained()
    conditioned = segmenter.condition(_features(segmenter), None)
    logits = torch.zeros(2, 16, 16, requires_grad=True)
    assert not segmenter.memorize(conditioned, logits).requires_grad
    segmenter.memory_gradient = True
    memory = segmenter.memorize(conditioned, logits)
    attended = segmenter.condition(_features(segmenter), memory[:, None])
    (gradient,) = torch.autograd.grad(attended.image_NChw.square().sum(), logits)
    assert gradient.abs().max() > 0


def test_identity_gamma_silences_the_fuser(segmenter: Sam2Segmenter) -> None:
    (before,) = _encoded(segmenter, 1)
    segmenter.is_fuser_identity = True
    segmenter.complete()
    fuser = segmenter.sam.memory_encoder.fuser
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fuser(x), x, rtol=0, atol=1e-4)
    (after,) = _encoded(segmenter, 1)
    assert (after - before).abs().max() > 1e-3


def test_bfloat16_runs_through_every_verb(segmenter: Sam2Segmenter) -> None:
    low = copy.deepcopy(segmenter).to(torch.bfloat16)
    frame = low.condition(_features(low), _memories(low, 2))
    decoded = low.decode(frame, _prompts(low).to(torch.bfloat16))
    assert decoded.logits_Nmm.dtype is torch.bfloat16
    assert torch.isfinite(decoded.logits_Nmm.float()).all()
    assert low.memorize(frame, decoded.logits_Nmm).dtype is torch.bfloat16
