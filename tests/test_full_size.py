"""The published model composes without weights and has the published sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import ModelConfig, Precision, TrainConfig, load_config
from glus.models.build import PARTS, build_glus, trainable_names
from glus.models.glus import Glus

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
    return sum(p.numel() for name, p in glus.named_parameters() if any(key in name for key in PARTS[part]))


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


def test_a_frame_is_64_tokens_and_sam2_sees_1024_pixels(glus: Glus) -> None:
    assert glus.tokens_per_frame == 64
    assert (glus.clip.image_size, glus.clip.select_layer) == (224, -2)
    assert (glus.segmenter.image_size, glus.segmenter.width) == (1024, 256)
    assert (glus.memory_frames, glus.memory_stride, glus.memory_detach) == (7, 1, True)
