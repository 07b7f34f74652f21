"""The published model composes without weights and has the published sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import ContrastiveConfig, ModelConfig, Precision, SegHeadInit, TrainConfig, load_config
from glus.models.build import parts_of, trainable_names
from glus.models.glus import Glus
from glus.models.mllm.adapters import plain_names
from glus.models.pretrained import build_glus
from glus.models.release import to_release
from glus.models.release_layout import GLUS_KEYS, lisa

CONFIGS = Path(__file__).parents[1] / "configs"


def _compose(experiment: str) -> TrainConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load_config(TrainConfig, compose("train", [f"experiment={experiment}"]))


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return _compose("glus_s").model


@pytest.fixture(scope="module")
def glus(config: ModelConfig) -> Iterator[Glus]:
    with torch.device("meta"):
        yield build_glus(config, load_weights=False)


def _count(glus: Glus, part: str) -> int:
    return sum(p.numel() for name, p in glus.named_parameters() if any(key in name for key in parts_of(glus)[part]))


def test_both_experiments_train_the_same_network(config: ModelConfig) -> None:
    glus_a = _compose("glus_a")
    assert glus_a.model == config
    assert glus_a.loss.weights["contrastive"] == 0
    assert _compose("glus_s").loss.weights["contrastive"] == 0.1
    assert (_compose("glus_s").trainer.steps, glus_a.trainer.steps) == (3000, 5000)


def test_it_builds_without_memory_for_its_weights(glus: Glus, config: ModelConfig) -> None:
    assert {parameter.device.type for parameter in glus.parameters()} == {"meta"}
    assert config.precision is Precision.bf16
    assert {parameter.dtype for parameter in glus.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("lora", 2 * 32 * 8 * (4096 + 4096)),  # 4.19 M: q_proj and v_proj of 32 layers, rank 8
        ("embeddings", 32004 * 4096),  # 131.1 M
        ("lm_head", 32004 * 4096),
        ("seg_head", 4096 * 4096 + 4096 + 4096 * 256 + 256),  # 17.8 M
        ("projector", 1024 * 4096 + 4096),  # 4.2 M
        ("mask_decoder", 4_215_109),
        ("clip", 303_179_776),
        ("llm", 6_738_448_384 + 4_194_304),  # LLaMA-7B with four more tokens, and LoRA
    ],
)
def test_part_has_its_published_size(glus: Glus, part: str, expected: int) -> None:
    assert _count(glus, part) == expected


def test_sam2_large_has_its_published_size(glus: Glus) -> None:
    state = glus.segmenter.sam.state_dict()
    assert len(state) == 900
    assert sum(tensor.numel() for tensor in state.values()) == 224_430_386
    decoder = [name for name in state if name.startswith("sam_mask_decoder.")]
    assert len(decoder) == 131


def test_what_is_trained_is_what_the_paper_trains(glus: Glus) -> None:
    expected = sum(
        _count(glus, part) for part in ("lora", "embeddings", "lm_head", "seg_head", "projector", "mask_decoder")
    )
    trained = set(trainable_names(glus))
    assert sum(p.numel() for name, p in glus.named_parameters() if name in trained) == expected == 292_614_725


def test_a_checkpoint_holds_at_most_3_6_gb(glus: Glus) -> None:
    """Three files of a float32 tensor per trained parameter; queues of 8 ranks; the rest is text and the tokenizer."""
    shapes = {name: tuple(p.shape) for name, p in glus.named_parameters() if p.requires_grad}
    tensors = 3 * sum(4 * math.prod(shape) + 200 for shape in shapes.values())  # and their names
    queues = 8 * ContrastiveConfig().queue_size * (glus.segmenter.width * 4 + 1000)
    assert 3 * 4 * 292_614_725 < tensors < 3.52e9
    assert tensors + queues + 5e6 <= 3.6e9


def test_a_frame_is_64_tokens_and_sam2_sees_1024_pixels(glus: Glus) -> None:
    assert glus.mllm.tokens_per_frame == 64
    assert (glus.mllm.clip.image_size, glus.mllm.clip.select_layer) == (224, -2)
    assert (glus.segmenter.image_size, glus.segmenter.width) == (1024, 256)
    assert (glus.memory_frames, glus.memory_stride, glus.segmenter.memory_gradient) == (7, 1, False)


# The published checkpoints, by METHOD 3.1 and 3.2 (names and shapes of the authors' files), spelled out.


def _language_shapes() -> dict[str, tuple[int, ...]]:
    """LLM, rotary frequencies, projector and [SEG] head: 329 tensors, of GLUS and of LISA-7B-v1."""
    width, inner = 4096, 11008
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32004, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (32004, width),
        "model.mm_projector.weight": (width, 1024),
        "model.mm_projector.bias": (width,),
        "model.text_hidden_fcs.0.0.weight": (width, width),
        "model.text_hidden_fcs.0.0.bias": (width,),
        "model.text_hidden_fcs.0.2.weight": (256, width),
        "model.text_hidden_fcs.0.2.bias": (256,),
    }
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes[f"{prefix}self_attn.rotary_emb.inv_freq"] = (64,)
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes


SOME_SAM2_SHAPES = {
    "maskmem_tpos_enc": (7, 1, 1, 64),
    "no_mem_embed": (1, 1, 256),
    "image_encoder.trunk.pos_embed": (1, 144, 7, 7),
    "image_encoder.trunk.blocks.47.mlp.layers.0.weight": (4608, 1152),
    "image_encoder.neck.convs.0.conv.weight": (256, 1152, 1, 1),
    "memory_attention.layers.3.cross_attn_image.k_proj.weight": (256, 64),
    "memory_encoder.fuser.layers.1.gamma": (256,),
    "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
    "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
    "obj_ptr_proj.layers.2.bias": (256,),
}


@pytest.fixture(scope="module")
def glus_7b(glus: Glus) -> dict[str, torch.Tensor]:
    """A merged GLUS-7B checkpoint in bfloat16, without memory for its values."""
    shapes = _language_shapes()
    for name, value in glus.segmenter.sam.state_dict().items():  # 900, by name and size another test's
        shapes[f"model.visual_model.{name}"] = tuple(value.shape)
    assert {name: shapes[f"model.visual_model.{name}"] for name in SOME_SAM2_SHAPES} == SOME_SAM2_SHAPES
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}


def _plain_shapes(glus: Glus, *prefixes: str) -> dict[str, torch.Size]:
    """Of our tensors, under their names without LoRA."""
    state = glus.state_dict()
    return {plain: state[name].shape for plain, name in plain_names(glus).items() if plain.startswith(prefixes)}


def test_a_published_glus_maps_one_to_one(glus: Glus, glus_7b: dict[str, torch.Tensor]) -> None:
    assert len(glus_7b) == 1229
    renamed = GLUS_KEYS.source("x", glus_7b)
    assert list(renamed.dropped.values()) == [32]
    assert not renamed.unknown
    assert len(renamed.tensors) == 1197
    ours = _plain_shapes(glus, "mllm.llama.", "mllm.projector.", "seg_head.", "segmenter.")
    assert {name: value.shape for name, value in renamed.tensors.items()} == ours
    assert len(plain_names(glus)) == 1197 + len(glus.mllm.clip.state_dict())
    for name in glus_7b:
        if not name.endswith("inv_freq"):
            assert [GLUS_KEYS.in_file(ours) for ours in GLUS_KEYS.source("x", {name: glus_7b[name]}).tensors] == [name]


def test_the_way_back_writes_every_key_of_a_published_glus(
    config: ModelConfig, glus_7b: dict[str, torch.Tensor]
) -> None:
    ours = GLUS_KEYS.source("x", glus_7b).tensors | {"mllm.clip.vision_model.x": torch.empty(1)}
    back = to_release(ours, config)
    assert len(back) == 1229
    assert {name: (value.shape, value.dtype) for name, value in back.items()} == {
        name: (value.shape, value.dtype) for name, value in glus_7b.items()
    }
    frequencies = [value for name, value in back.items() if name.endswith("inv_freq")]
    expected = torch.tensor([10000 ** (-i / 64) for i in range(64)], dtype=torch.float64, device="cpu")
    assert all(torch.equal(value, expected.float().bfloat16()) for value in frequencies)


def _sam1_names() -> list[str]:
    """LISA's SAM-1 ViT-H: 594 tensors."""
    both, attention = ("weight", "bias"), [f"{name}_proj" for name in ("q", "k", "v", "out")]
    block = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]
    image = ["pos_embed", "neck.0.weight", "neck.2.weight", *(f"{x}.{y}" for x in ("neck.1", "neck.3") for y in both)]
    image += [f"patch_embed.proj.{kind}" for kind in both]
    image += [f"blocks.{i}.{name}.{kind}" for i in range(32) for name in block for kind in both]
    image += [f"blocks.{i}.attn.rel_pos_{side}" for i in range(32) for side in "hw"]
    prompt = ["pe_layer.positional_encoding_gaussian_matrix", "not_a_point_embed.weight", "no_mask_embed.weight"]
    prompt += [f"point_embeddings.{i}.weight" for i in range(4)]
    prompt += [f"mask_downscaling.{i}.{kind}" for i in (0, 1, 3, 4, 6) for kind in both]
    layer = [f"{kind}.{name}" for kind in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
             for name in attention]  # fmt: skip
    layer += ["norm1", "norm2", "norm3", "norm4", "mlp.lin1", "mlp.lin2"]
    mask = [f"transformer.layers.{i}.{name}" for i in range(2) for name in layer]
    mask += [f"transformer.final_attn_token_to_image.{name}" for name in attention]
    mask += ["transformer.norm_final_attn", *(f"output_upscaling.{i}" for i in (0, 1, 3))]
    mask += [f"output_hypernetworks_mlps.{i}.layers.{j}" for i in range(4) for j in range(3)]
    mask += [f"iou_prediction_head.layers.{j}" for j in range(3)]
    decoder = ["iou_token.weight", "mask_tokens.weight", *(f"{name}.{kind}" for name in mask for kind in both)]
    parts = {"image_encoder": image, "prompt_encoder": prompt, "mask_decoder": decoder}
    return [f"model.visual_model.{part}.{name}" for part, names in parts.items() for name in names]


@pytest.mark.parametrize(("init", "taken"), [(SegHeadInit.random, 293), (SegHeadInit.lisa, 297)])
def test_lisa_7b_gives_llm_and_projector(glus: Glus, config: ModelConfig, init: SegHeadInit, taken: int) -> None:
    assert config.llm.weights == config.llm.tokenizer == "weights/LISA-7B-v1"
    assert config.seg_head_init is SegHeadInit.random
    language = {name: torch.empty(shape, device="meta") for name, shape in _language_shapes().items()}
    sam1 = {name: torch.empty(1, device="meta") for name in _sam1_names()}
    assert (len(language), len(sam1)) == (329, 594)
    renamed = lisa(init).source("x", language | sam1)
    assert not renamed.unknown
    assert sorted(renamed.dropped.values()) == sorted([32, 594] + [4] * (init is SegHeadInit.random))
    parts = ("mllm.llama.", "mllm.projector.") + (("seg_head.",) if init is SegHeadInit.lisa else ())
    assert {name: value.shape for name, value in renamed.tensors.items()} == _plain_shapes(glus, *parts)
    assert len(renamed.tensors) == taken
