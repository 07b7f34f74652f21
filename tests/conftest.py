"""A model so small that tests can build, train and run it in seconds."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from glus.config import (
    ClipConfig,
    FramesConfig,
    InferenceConfig,
    LlmConfig,
    MemoryConfig,
    ModelConfig,
    ModelFolderConfig,
    SegmenterConfig,
)
from glus.data.chat.llava import train_vocabulary
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel, build_glus
from glus.models.release import build_release, read_release
from glus.tokens import Vocabulary
from tests.merging import merge_lora
from tests.released_layout import glus_tensors, write_checkpoint

SENTENCES = ["the red circle", "the circle moving left", "the blue square that turns", "all shapes"]

SAM2_OVERRIDES = {
    "image_size": 64,
    "image_encoder.trunk.embed_dim": 16,
    "image_encoder.trunk.stages": [1, 1, 2, 1],
    "image_encoder.trunk.global_att_blocks": [3],
    "image_encoder.neck.d_model": 32,
    "image_encoder.neck.position_encoding.num_pos_feats": 32,
    "image_encoder.neck.backbone_channel_list": [128, 64, 32, 16],
    "memory_attention.d_model": 32,
    "memory_attention.num_layers": 1,
    "memory_attention.layer.d_model": 32,
    "memory_attention.layer.dim_feedforward": 64,
    "memory_attention.layer.dropout": 0.0,
    "memory_attention.layer.self_attention.embedding_dim": 32,
    "memory_attention.layer.self_attention.feat_sizes": [4, 4],
    "memory_attention.layer.self_attention.dropout": 0.0,
    "memory_attention.layer.cross_attention.embedding_dim": 32,
    "memory_attention.layer.cross_attention.feat_sizes": [4, 4],
    "memory_attention.layer.cross_attention.kv_in_dim": 16,
    "memory_attention.layer.cross_attention.dropout": 0.0,
    "memory_encoder.out_dim": 16,
    "memory_encoder.in_dim": 32,
    "memory_encoder.position_encoding.num_pos_feats": 16,
    "memory_encoder.mask_downsampler.embed_dim": 32,
    "memory_encoder.fuser.layer.dim": 32,
    "memory_encoder.fuser.layer.layer_scale_init_value": 0.1,
}


def tiny_segmenter(**fields: Any) -> SegmenterConfig:
    """SAM2 at 64 pixels."""
    return SegmenterConfig("sam2_hiera_t", SAM2_OVERRIDES, multimask_fallback=False, **fields)


def load_release(source: str | Path, segmenter: SegmenterConfig, clip: str | None = None) -> LoadedModel:
    """A merged GLUS checkpoint as a model, in evaluation mode."""
    return build_release(read_release(source, segmenter, clip))[0]


def tiny_model_config(tokenizer: Path, vocab_size: int) -> ModelConfig:
    """CLIP of 16 patches, an LLM of two layers, SAM2 at 64 pixels, LoRA and all parts real."""
    clip = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
    }
    llm = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    return ModelConfig(
        clip=ClipConfig(architecture=clip, pool=4),
        llm=LlmConfig(architecture=llm, vocab_size=vocab_size, tokenizer=str(tokenizer), lora_rank=2, lora_dropout=0.0),
        segmenter=tiny_segmenter(),
        memory=MemoryConfig(num_frames=3),
    )


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """Trained on four sentences."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_vocabulary(folder, SENTENCES, 400)
    return Vocabulary(folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_vocabulary: Vocabulary) -> LoadedModel:
    """Random weights from a fixed seed, in evaluation mode; ``copy.deepcopy(tiny_model.glus)`` to change them."""
    model = tiny_model_config(tiny_vocabulary.folder, tiny_vocabulary.size)
    torch.manual_seed(0)
    glus = build_glus(model).eval()
    return LoadedModel(glus, tiny_vocabulary, ModelFolderConfig(model, FramesConfig(2, 2), InferenceConfig()))


@pytest.fixture(scope="session")
def merged_glus(tiny_model: LoadedModel) -> Glus:
    """The tiny model, LoRA merged, every tensor moved from its initial value so that each one matters."""
    glus = copy.deepcopy(tiny_model.glus)
    merge_lora(glus.mllm.llama)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in glus.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return glus.eval()


@pytest.fixture(scope="session")
def released(merged_glus: Glus, tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as its authors would publish it, its CLIP in ``clip`` beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    return write_checkpoint(folder, glus_tensors(merged_glus), merged_glus, tiny_model.vocabulary)


@pytest.fixture
def released_copy(released: Path, tmp_path: Path) -> Path:
    """A copy of both that a test may change."""
    shutil.copytree(released.parent, tmp_path / "copy")
    return tmp_path / "copy" / released.name


@pytest.fixture
def segmenter_file(tmp_path: Path) -> Path:
    """Which SAM2 the tiny model has, as ``--segmenter`` takes it."""
    file = tmp_path / "sam2.json"
    file.write_text(json.dumps({"variant": "sam2_hiera_t", "overrides": SAM2_OVERRIDES, "multimask_fallback": False}))
    return file
