"""The other families at full size, without memory for their values: sizes, tokens, what a batch costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import Precision, TrainConfig, load_config
from glus.models.glus import Glus
from glus.models.pretrained import build_glus
from glus.train.plan import count_parameters, example_batch, measure_sizes, trace_micro_batch
from glus.types import Role

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "glus_internvl3_2b": ("internvl", "InternVLForConditionalGeneration"),
    "glus_internvl3_8b": ("internvl", "InternVLForConditionalGeneration"),
    "glus_qwen3_vl_2b": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "glus_qwen3_vl_4b": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "glus_qwen3_vl_8b": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
}


def _compose(*overrides: str) -> TrainConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = load_config(TrainConfig, compose("train", list(overrides)))
    config.model.trainable = ["lora", "seg_head", "projector", "mask_decoder"]  # new rows need a vocabulary
    return config


def _build(config: TrainConfig) -> Glus:
    with torch.device("meta"):
        return build_glus(config.model, load_weights=False)


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_parameters_of_transformers_own_class(name: str) -> None:
    """Of that class, built from its own config classes."""
    import transformers

    family, class_name = MODELS[name]
    config = _compose(f"model={name}")
    model = config.model
    assert (model.family, model.precision) == (family, Precision.bf16)
    config.model.llm.lora_rank = 0
    config.model.trainable.remove("lora")
    glus = _build(config)
    tables = {"vocab_size": model.llm.vocab_size, "tie_word_embeddings": model.llm.tied}
    kind = {"model_type": "qwen2"} if family == "internvl" else {}
    class_config = getattr(transformers, class_name.replace("ForConditionalGeneration", "Config"))(
        vision_config=model.vision.architecture,
        text_config={**kind, **model.llm.architecture, **tables},
        tie_word_embeddings=model.llm.tied,
    )
    with torch.device("meta"):
        theirs = getattr(transformers, class_name)(class_config)
    mllm: Any = glus.mllm
    assert mllm.net.num_parameters() == theirs.num_parameters()
    assert {name: p.shape for name, p in mllm.net.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    counts = count_parameters(glus)
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in glus.parameters())


@pytest.mark.parametrize(
    ("name", "size", "context", "query"),
    [
        ("glus_internvl3_8b", (720, 1280), (8, 8), (8, 8)),
        ("glus_qwen3_vl_4b", (448, 448), (7, 7), (14, 14)),
        ("glus_qwen3_vl_4b", (256, 448), (5, 9), (8, 14)),
        ("glus_qwen3_vl_4b", (720, 1280), (5, 9), (10, 18)),
    ],
)
def test_a_frame_is_seen_in_so_many_tokens(
    name: str, size: tuple[int, int], context: tuple[int, int], query: tuple[int, int]
) -> None:
    mllm = _build(_compose(f"model={name}")).mllm
    assert (mllm.grid(size, Role.context), mllm.grid(size, Role.query)) == (context, query)
    prepared = mllm.prepare(np.zeros((*size, 3), np.uint8), Role.query)
    if mllm.chat.has_axes:
        assert prepared.shape == (32 * query[0], 32 * query[1], 3)


@pytest.mark.parametrize("experiment", ["glus_a_internvl3_8b", "glus_a_qwen3_vl_4b"])
def test_a_recipe_can_be_planned(experiment: str) -> None:
    """Its micro-batch runs, forwards and backwards, on the meta device."""
    config = _compose(f"experiment={experiment}")
    assert config.recipe is None  # ours, with no result to compare with
    sizes = measure_sizes(_build(config))
    assert 0 < sizes.trained < sizes.total
    assert sizes.projections > sizes.total // 2
    trace = trace_micro_batch(config, num_videos=1, checkpointing=True)
    assert trace.flops["LLM"] > trace.flops["vision tower"] > 0
    batch = example_batch(config, _build(config).mllm, 1)
    assert trace.tokens == batch.rows.input_ids_BL.numel()
