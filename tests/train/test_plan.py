"""What a plan says: exact counts, a trace that counts what really happens, and advice that fits."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import BUCKET_NUMBERS, GIB, DataConfig, HardwareConfig, Offload, Precision, TrainConfig, load_config
from glus.config.training import TrainerConfig
from glus.data.chat.tree import LENGTH_MULTIPLE, unpack_conversations
from glus.losses.objective import GlusObjective
from glus.models.build import assemble
from glus.models.pretrained import build_glus
from glus.tokens import Vocabulary
from glus.train.engine import _deepspeed_config
from glus.train.plan import (
    Option,
    Trace,
    WeightCounts,
    count_costs,
    count_parameters,
    example_batch,
    host_lines,
    measure_sizes,
    memory_lines,
    micro_batch_sizes,
    options,
    peak_videos_per_second,
    recommend,
    total_bytes,
    trace_micro_batch,
)
from tests.conftest import tiny_model_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))


def full_size(*overrides: str) -> TrainConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load_config(TrainConfig, compose("train", ["experiment=glus_s", *overrides]))


@pytest.fixture(scope="module")
def tiny(tiny_vocabulary: Vocabulary) -> TrainConfig:
    model = tiny_model_config(tiny_vocabulary.folder, tiny_vocabulary.size)
    return TrainConfig(model=model, data=DataConfig(expressions_per_video=2), trainer=TrainerConfig(steps=10))


@pytest.fixture(scope="module")
def traces(tiny: TrainConfig) -> dict[bool, Trace]:
    return {checkpointing: trace_micro_batch(tiny, 1, checkpointing) for checkpointing in (False, True)}


def test_a_trace_counts_what_a_real_step_does(tiny: TrainConfig, traces: dict[bool, Trace]) -> None:
    glus, traced = build_glus(tiny.model).train(), traces[False]
    batch = example_batch(tiny, glus.mllm, 1)
    objective = GlusObjective({"seg": 1, "bce": 2, "dice": 0.5}, seg_id=0)
    real = count_costs(glus, objective, batch)
    assert real.tokens == traced.tokens
    assert sum(real.kept.values()) == pytest.approx(sum(traced.kept.values()), rel=0.05)
    assert real.peak == pytest.approx(traced.peak, rel=0.1)
    assert real.flops == pytest.approx(traced.flops, rel=1e-6)


def test_checkpointing_keeps_less_and_computes_more(traces: dict[bool, Trace]) -> None:
    plain, checkpointed = traces[False], traces[True]
    assert checkpointed.kept["LLM"] < 0.5 * plain.kept["LLM"]
    assert 1.15 < checkpointed.flops["LLM"] / plain.flops["LLM"] < 1.5  # a forward pass more, less what is not needed
    assert {part: plain.flops[part] for part in plain.flops if part != "LLM"} == {
        part: checkpointed.flops[part] for part in plain.flops if part != "LLM"
    }


def test_costs_grow_in_proportion_to_the_videos(tiny: TrainConfig, traces: dict[bool, Trace]) -> None:
    two = trace_micro_batch(tiny, 2, False)
    assert sum(two.flops.values()) == pytest.approx(2 * sum(traces[False].flops.values()), rel=0.01)
    assert sum(two.kept.values()) == pytest.approx(2 * sum(traces[False].kept.values()), rel=0.01)


def test_published_counts() -> None:
    config = full_size()
    with torch.device("meta"):
        glus = build_glus(config.model, load_weights=False)
    parts, sizes = count_parameters(glus), measure_sizes(glus)
    total, trained = (sum(numbers) for numbers in zip(*parts.values(), strict=True))
    assert trained == sizes.trained == 292_614_725  # "293 M"
    assert total == sizes.total == sum(p.numel() for p in glus.parameters()) == 7_292_281_138
    assert (parts["embeddings"][1], parts["lora"][1]) == (32004 * 4096, 4_194_304)
    assert parts["llm"] == (6_738_448_384 - 2 * 32004 * 4096, 0)
    assert parts["clip"][1] == parts["image_encoder"][1] == 0
    assert sizes.projections == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    batch = example_batch(config, glus.mllm, num_videos=1)
    (alone,) = {len(conversation.input_ids) for conversation in unpack_conversations(batch.rows)}
    assert alone == 309 + 4 * (92 + 10)  # what all have, and four turns, each with its frame
    packed = alone + 2 * (alone - 309 - 66)  # which begin with the same frame
    assert batch.rows.input_ids_BL.shape[1] == packed + -packed % LENGTH_MULTIPLE


def _lines(config: TrainConfig, traces: dict[bool, Trace], gpus: int = 4, **trainer: object) -> dict[str, float]:
    config = copy.deepcopy(config)
    for name, value in trainer.items():
        setattr(config.trainer, name, value)
    with torch.device("meta"):
        sizes = measure_sizes(build_glus(config.model, load_weights=False))
    lines = memory_lines(config, sizes, HardwareConfig(num_gpus=gpus), traces[False])
    return {line.what: line.bytes for line in lines}


def test_stages_share_what_they_share(tiny: TrainConfig, traces: dict[bool, Trace]) -> None:
    tiny = copy.deepcopy(tiny)
    tiny.model.precision = Precision.bf16
    with torch.device("meta"):
        sizes = measure_sizes(build_glus(tiny.model, load_weights=False))
    by_stage = {stage: _lines(tiny, traces, zero_stage=stage) for stage in (2, 3)}
    for lines in by_stage.values():
        assert (lines["optimizer"], lines["gradients"]) == (12 * sizes.trained / 4, 2 * sizes.trained / 4)
    assert by_stage[2]["weights"] == 2 * sizes.total
    assert by_stage[3]["weights"] == 2 * sizes.total / 4 + 2 * sizes.total  # a small model is gathered whole
    assert _lines(tiny, traces, zero_stage=2, offload=Offload.optimizer)["optimizer"] == 0
    more = _lines(tiny, traces, micro_batch_size=4)["activations: LLM"]
    assert more == 2 * _lines(tiny, traces, micro_batch_size=2)["activations: LLM"]


@pytest.mark.parametrize("offload", Offload)
def test_stage_3_begins_with_the_whole_model_on_each_gpu(
    tiny: TrainConfig, traces: dict[bool, Trace], offload: Offload
) -> None:
    config = copy.deepcopy(tiny)
    config.trainer.zero_stage, config.trainer.offload = 3, offload
    sizes = WeightCounts(total=7 * 10**9, trained=3 * 10**8, projections=6 * 10**9, small=3 * 10**8)
    lines = memory_lines(config, sizes, HardwareConfig(num_gpus=64), traces[False])
    assert total_bytes(lines) == pytest.approx(4 * sizes.total + 1.5 * GIB)
    small = memory_lines(config, WeightCounts(10**6, 10**6, 0, 10**6), HardwareConfig(num_gpus=64), traces[False])
    assert {line.what: line.bytes for line in small}["more at the start"] == 0


def test_gradients_are_summed_through_the_buffer_that_deepspeed_is_given(
    tiny: TrainConfig, traces: dict[bool, Trace]
) -> None:
    """The whole embedding table of LLaMA fits, but not all that is trained."""
    assert _lines(tiny, traces, zero_stage=2)["communication"] == 4 * BUCKET_NUMBERS
    assert 32004 * 4096 < BUCKET_NUMBERS < 292_614_725
    config = _deepspeed_config(tiny.trainer, 1, torch.float32)
    assert config["zero_optimization"]["reduce_bucket_size"] == BUCKET_NUMBERS


def test_offloading_moves_to_the_machine(tiny: TrainConfig) -> None:
    with torch.device("meta"):
        sizes = measure_sizes(build_glus(tiny.model, load_weights=False))
    config = copy.deepcopy(tiny)
    config.trainer = dataclasses.replace(config.trainer, zero_stage=3, offload=Offload.parameters)
    host = {line.what: line.bytes for line in host_lines(config, sizes, HardwareConfig(num_nodes=2, num_gpus=4))}
    assert host["offloaded optimizer"] == 16 * sizes.trained / 2
    assert host["offloaded weights"] == 4 * sizes.total / 2


def test_a_node_holds_no_copy_of_weights_that_are_loaded(tiny: TrainConfig) -> None:
    """Each of its processes draws what is small; the tiny model, which names no files, is drawn whole."""
    with torch.device("meta"):
        glus = build_glus(tiny.model, load_weights=False)
    sizes, hardware, loaded = measure_sizes(glus), HardwareConfig(num_nodes=2, num_gpus=8), copy.deepcopy(tiny)
    loaded.model.weights = "a folder"
    small = [p.numel() for n, p in assemble(tiny.model, True, True).named_parameters() if not p.is_meta]
    assert sizes.small == sum(small) < 0.9 * sizes.total
    for config, drawn in ((tiny, sizes.total), (loaded, sizes.small)):
        host = {line.what: line.bytes for line in host_lines(config, sizes, hardware)}
        assert host["drawn at random"] == 4 * drawn * 4
    assert host["processes"] == 4 * 3 * GIB


def test_advice_prefers_what_changes_least(tiny: TrainConfig, traces: dict[bool, Trace]) -> None:
    with torch.device("meta"):
        sizes = measure_sizes(build_glus(tiny.model, load_weights=False))

    def best(gigabytes: float) -> Option | None:
        return recommend(tiny, sizes, HardwareConfig(num_gpus=4, gpu_memory_gb=gigabytes), traces)

    roomy = best(80)
    assert roomy is not None
    assert roomy.overrides() == (
        "trainer.zero_stage=2 trainer.micro_batch_size=10 trainer.gradient_checkpointing=false "
        "trainer.offload=none model.llm.quantization=none"
    )
    assert best(1) is None
    every = list(options(tiny, sizes, HardwareConfig(num_gpus=4), traces))
    tiny.model.family = "qwen3_vl"
    for num_gpus, stages in ((1, {2, 3}), (4, {2})):  # 3 with its parameters in the machine's memory
        found = options(tiny, sizes, HardwareConfig(num_gpus=num_gpus), traces)
        assert {option.config.trainer.zero_stage for option in found} == stages
    tiny.model.family = "llava"
    tight = best((min(option.bytes for option in every) + 1e6) / GIB / 0.94)
    assert tight is not None
    assert tight.bytes < roomy.bytes
    assert tight.config.trainer.micro_batch_size == 1
    assert tiny.trainer.micro_batch_size == 2, "the run's own config stays"


def test_gpus_that_cannot_share_the_batch_are_told_which_can() -> None:
    assert micro_batch_sizes(80, 4) == [10, 5, 4, 2, 1]
    assert micro_batch_sizes(80, 16) == [5, 1]
    with pytest.raises(ValueError, match=r"num_gpus=32 cannot share .*=80 equally: use 20 or 40 of them"):
        micro_batch_sizes(80, 32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_machines_keep_the_global_batch(recipe: str) -> None:
    config = full_size(f"hardware={recipe}")
    assert config.hardware is not None
    assert config.trainer.global_batch_size == 80
    assert config.trainer.micro_batch_size in micro_batch_sizes(80, config.hardware.num_gpus)
    assert full_size(f"hardware={recipe}", "trainer.micro_batch_size=1").trainer.micro_batch_size == 1


@pytest.mark.slow
def test_recipes_of_machines_fit_by_plan() -> None:
    config = full_size()
    with torch.device("meta"):
        sizes = measure_sizes(build_glus(config.model, load_weights=False))
    traces = {checkpointing: trace_micro_batch(config, 1, checkpointing) for checkpointing in (False, True)}
    alone, width, layers = 309 + 4 * 102, 4096, 32
    length, attended = (tokens + -tokens % LENGTH_MULTIPLE for tokens in (3 * alone - 2 * (309 + 66), alone))
    assert traces[False].tokens == length
    products = 4 * sizes.projections * length  # forwards, and the gradient of inputs
    attention = 7 * 2 * layers * 3 * attended**2 / 2 * width  # two products forwards, five backwards, half hidden
    assert traces[False].flops["LLM"] == pytest.approx(products + attention, rel=0.01)
    for recipe in RECIPES:
        config = full_size(f"hardware={recipe}")
        hardware = config.hardware
        assert hardware is not None
        trace = traces[config.trainer.gradient_checkpointing]
        assert total_bytes(memory_lines(config, sizes, hardware, trace)) < 0.94 * hardware.gpu_memory_gb * GIB, recipe
        assert total_bytes(host_lines(config, sizes, hardware)) < hardware.node_memory_gb * GIB, recipe
        assert recommend(config, sizes, hardware, traces) is not None


def test_the_peak_of_training_is_the_cards_over_the_operations_of_a_video(
    tiny: TrainConfig, traces: dict[bool, Trace]
) -> None:
    flops = sum(traces[False].flops.values())
    assert peak_videos_per_second(tiny, "NVIDIA H100 80GB HBM3", num_gpus=4) == pytest.approx(4 * 989e12 / flops)
    assert peak_videos_per_second(tiny, "CPU", num_gpus=4) is None
    assert peak_videos_per_second(tiny, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", num_gpus=1) is None
