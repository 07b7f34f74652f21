"""Published checkpoints: what is read from them, what it computes, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glus.batch import Batch
from glus.config import FuserGamma, Precision, SegmenterConfig
from glus.models.build import trainable_names
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from glus.models.release import build_release, read_release, to_release
from glus.models.weights import MisfitError, read_tensors
from tests.conftest import SAM2_OVERRIDES, load_release, tiny_segmenter
from tests.edits import edit_json
from tests.models.conftest import BatchMaker
from tests.released_layout import glus_tensors, rewrite_weights, write_checkpoint


def assert_same_outputs(a: Glus, b: Glus, batch: Batch) -> None:
    with torch.no_grad():
        one, other = a(batch), b(batch)
    for name in ("seg_logits_NQV", "seg_embeds_NQC", "mask_logits_NQmm"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors", "safetensors shards"])
def test_a_checkpoint_of_any_form_is_the_same_model(
    merged_glus: Glus, tiny_model: LoadedModel, make_batch: BatchMaker, tmp_path: Path, form: str
) -> None:
    raw = glus_tensors(merged_glus)
    write_checkpoint(tmp_path / "checkpoint", raw, merged_glus, tiny_model.vocabulary, form)
    loaded, reports = build_release(read_release(tmp_path / "checkpoint", tiny_segmenter()))
    report = reports["checkpoint"]
    assert (report.matched, report.is_clean) == (len(raw) - 2, True)
    assert list(report.dropped.values()) == [2]
    assert reports["model.clip.weights"].matched == len(merged_glus.mllm.clip.vision_model.state_dict())
    torch.testing.assert_close(loaded.glus.state_dict(), merged_glus.state_dict(), rtol=0, atol=0)
    assert not loaded.glus.training
    assert_same_outputs(loaded.glus, merged_glus, make_batch((2, 1)))


def test_sizes_tokens_and_settings_are_the_checkpoints(released: Path, tiny_model: LoadedModel) -> None:
    loaded = load_release(released, tiny_segmenter())
    config, expected = loaded.config.model, tiny_model.config.model
    assert expected.llm.architecture.items() <= config.llm.architecture.items()
    assert expected.clip.architecture.items() - {("projection_dim", 32)} <= config.clip.architecture.items()
    assert (config.llm.vocab_size, config.llm.lora_rank) == (expected.llm.vocab_size, 0)
    assert (config.clip.select_layer, config.clip.pool) == (-2, 4)
    assert config.precision is Precision.fp32
    assert "lora" not in config.trainable
    assert loaded.vocabulary.folder == released
    assert loaded.vocabulary.seg_id == tiny_model.vocabulary.seg_id
    frames, inference = loaded.config.frames, loaded.config.inference
    assert (frames.num_context, frames.num_query, inference.memory_stride) == (4, 4, 3)


def test_other_values_of_config_json_are_taken_over(released_copy: Path) -> None:
    file = released_copy / "config.json"
    values = {"mm_vision_select_layer": -1, "rms_norm_eps": 1e-5, "num_key_value_heads": None}
    edit_json(file, lambda content: content.update(values))
    with pytest.raises(ValueError, match="num_key_value_heads=null, expected int"):
        load_release(released_copy, tiny_segmenter())
    edit_json(file, lambda content: content.pop("num_key_value_heads"))  # older checkpoints: as many as heads
    glus = load_release(released_copy, tiny_segmenter()).glus
    assert glus.mllm.clip.select_layer == -1
    assert glus.mllm.llama.model.norm.variance_epsilon == 1e-5
    assert glus.mllm.llama.config.num_key_value_heads == 2


def test_a_checkpoint_in_bfloat16_is_computed_in_it(released_copy: Path, merged_glus: Glus) -> None:
    rewrite_weights(released_copy, lambda tensors: to_dtype(tensors, torch.bfloat16))
    loaded = load_release(released_copy, tiny_segmenter())
    assert loaded.config.model.precision is Precision.bf16
    assert torch.equal(loaded.glus.mllm.projector.weight, merged_glus.mllm.projector.weight.bfloat16())


def test_parts_in_float32_behind_an_llm_in_bfloat16_leave_the_model_in_it(released_copy: Path) -> None:
    """As LISA's program for merging stores SAM and the head that it adds itself."""
    late = ("visual_model.", "text_hidden_fcs.", "model.visual_model.", "model.text_hidden_fcs.")
    rewrite_weights(
        released_copy,
        lambda tensors: tensors.update({n: v if n.startswith(late) else v.bfloat16() for n, v in tensors.items()}),
    )
    loaded = load_release(released_copy, tiny_segmenter())
    assert loaded.config.model.precision is Precision.bf16
    assert {parameter.dtype for parameter in loaded.glus.parameters()} == {torch.bfloat16}


def to_dtype(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    tensors.update({name: value.to(dtype) for name, value in tensors.items()})


def test_identity_gamma_holds_over_the_checkpoints(released: Path) -> None:
    for gamma, share in ((FuserGamma.identity, 1.0), (FuserGamma.checkpoint, 0.0)):
        fuser = load_release(released, tiny_segmenter(fuser_gamma=gamma)).glus.segmenter.sam.memory_encoder.fuser
        assert all(float((layer.gamma == 1e-6).float().mean()) == share for layer in fuser.layers)


def test_adapters_can_be_put_on_top(released: Path, merged_glus: Glus, make_batch: BatchMaker) -> None:
    checkpoint = read_release(released, tiny_segmenter())
    checkpoint.config.llm.lora_rank = 2
    checkpoint.config.trainable = ["lora"]
    loaded, reports = build_release(checkpoint)
    assert reports["checkpoint"].is_clean
    assert len(trainable_names(loaded.glus)) == 2 * 2 * 2  # A and B of q and v in both layers
    assert_same_outputs(loaded.glus, merged_glus, make_batch((1,)))


def test_damage_is_found_below_adapters_too(released_copy: Path) -> None:
    rewrite_weights(released_copy, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight", None))
    checkpoint = read_release(released_copy, tiny_segmenter())
    checkpoint.config.llm.lora_rank = 2
    with pytest.raises(MisfitError, match=r"1 missing.*: model\.layers\.0\.self_attn\.q_proj\.weight$"):
        build_release(checkpoint)


def test_another_sam2_than_the_checkpoints_is_refused(released: Path) -> None:
    other = SegmenterConfig("sam2_hiera_s", SAM2_OVERRIDES | {"image_encoder.trunk.stages": [1, 2, 2, 1]})
    with pytest.raises(MisfitError, match=r"missing: model\.visual_model\.image_encoder.*wrong shape: model\.visual"):
        load_release(released, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_gives_every_bit(released_copy: Path, dtype: torch.dtype) -> None:
    rewrite_weights(released_copy, lambda tensors: to_dtype(tensors, dtype))
    raw, loaded = read_tensors(released_copy), load_release(released_copy, tiny_segmenter())
    back = to_release(loaded.glus.state_dict(), loaded.config.model)
    assert back.keys() == raw.keys()
    exact = torch.float32 if dtype is torch.float16 else dtype  # our precisions; float32 holds float16 exactly
    for name, value in raw.items():
        assert back[name].dtype is exact, name
        if name.endswith("inv_freq") and dtype is torch.float16:
            torch.testing.assert_close(back[name].half(), value, rtol=0, atol=0)
        else:
            assert torch.equal(back[name], value.to(exact)), name


def test_adapters_and_strangers_have_no_place_in_the_released_layout(
    tiny_model: LoadedModel, merged_glus: Glus
) -> None:
    config = tiny_model.config.model
    with pytest.raises(ValueError, match=r"tensors have no place .*base_layer.*LoRA adapters must be merged first"):
        to_release(tiny_model.glus.state_dict(), config)
    with pytest.raises(ValueError, match="1 tensors have no place in the released layout, such as score_head"):
        to_release(merged_glus.state_dict() | {"score_head.weight": torch.zeros(1)}, config)
