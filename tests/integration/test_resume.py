"""An interrupted run goes on as if nothing had happened: same process, other number of processes, other ZeRO stage."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from glus.config import MixtureItem, ModelFolderConfig, Precision, TrainConfig, load_config
from glus.data.chat.llava import LlavaChat
from glus.data.loader import build_mixture
from glus.models.pretrained import build_glus, load_model
from glus.tokens import Vocabulary
from glus.train.guards import EXIT_PREEMPTED
from tests.integration.conftest import COST, Finished, read_metrics

SAVE_EVERY = 3


@pytest.fixture
def make_config(tiny_train_config: Callable[..., TrainConfig], tmp_path: Path) -> Callable[[str, int], TrainConfig]:
    """A run of some steps with everything that is random in it: dropout, the contrastive queue and its draws."""

    def make(name: str, steps: int) -> TrainConfig:
        config = tiny_train_config(output=str(tmp_path / name))
        config.model.llm.lora_dropout = 0.1
        config.loss.contrastive.num_negatives = 6
        config.loss.contrastive.queue_size = 40
        config.trainer.steps = steps
        config.trainer.micro_batch_size = 1
        config.trainer.save_every = SAVE_EVERY
        return config

    return make


def curve(folder: Path) -> list[dict[str, float]]:
    """All that was recorded of each step, but its duration."""
    return [{name: value for name, value in line.items() if name not in COST} for line in read_metrics(folder)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def interrupt_at_random(seed: int, steps: int, count: int) -> list[tuple[str, int]]:
    """(fault, step) in order; every third one in the middle of a save."""
    rng = np.random.default_rng(seed)
    chosen = sorted(int(step) for step in rng.choice(np.arange(1, steps), count, replace=False))
    kinds = ("SIGTERM", "SIGKILL", "kill_while_saving", "SIGUSR1", "SIGKILL")
    faults = [(kinds[i % len(kinds)], step) for i, step in enumerate(chosen)]
    return [(kind, -(-step // SAVE_EVERY) * SAVE_EVERY if "saving" in kind else step) for kind, step in faults]


def check_interruption(done: Finished, fault: str) -> None:
    if fault in ("SIGTERM", "SIGUSR1"):
        assert done.codes == [EXIT_PREEMPTED] * len(done.codes), done.output
        assert f"stopped by {fault} after step" in done.outputs[0]
    else:
        assert done.codes[0] == -signal.SIGKILL, done.output


def test_a_signal_saves_and_the_same_command_goes_on(run_training: Callable, make_config: Callable) -> None:
    whole, parts = make_config("whole", 4), make_config("parts", 4)
    parts.data.num_workers = 1
    assert run_training(whole).is_ok
    check_interruption(run_training(parts, "SIGTERM", step=2), "SIGTERM")
    folder = Path(parts.output)
    assert checkpoints(folder) == ["step_2"]
    check_size(folder / "checkpoints" / "step_2")
    assert run_training(parts).is_ok
    assert curve(folder) == curve(Path(whole.output))
    assert json.loads((folder / "run.json").read_text())["resumed"][0]["step"] == 2
    assert "checkpoints up to step_4" in run_training(with_resume(parts, "never")).output
    changed = make_config("parts", 4)
    changed.trainer.learning_rate, changed.trainer.log_every = 0.5, 2
    refused = run_training(changed)
    assert refused.codes == [1]
    assert "under a config that gives other results: trainer.learning_rate=0.5 (was 0.001). Restore" in refused.output
    assert "start a new run from it: model.weights=" in refused.output
    finished = run_training(with_resume(parts, "auto"))
    assert finished.is_ok
    assert f"{folder} is finished: 4 steps are done. A new run from it: model.weights=" in finished.output


def check_size(checkpoint: Path) -> None:
    """Three float32 tensors for each trained parameter, and beside them no weights at all."""
    config = load_config(ModelFolderConfig, OmegaConf.load(checkpoint / "config.yaml"))  # type: ignore[arg-type]
    with torch.device("meta"):
        glus = build_glus(config.model, load_weights=False)
    numbers = sum(p.numel() for p in glus.parameters() if p.requires_grad)
    assert numbers < sum(p.numel() for p in glus.parameters())
    tensors = {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}
    queue = tensors.pop("queue.safetensors")
    assert queue["embed"].shape[0] > 0
    for name in ("trained.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"):
        assert sum(tensor.numel() for tensor in tensors[name].values()) == numbers
        assert {tensor.dtype for tensor in tensors.pop(name).values()} == {torch.float32}
    assert not tensors


def with_resume(config: TrainConfig, resume: str) -> TrainConfig:
    config.trainer.resume = resume
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "zero_stage"), [(1, 2), (2, 2)])
def test_ten_interruptions_leave_the_curve_bit_for_bit(
    run_training: Callable, make_config: Callable, processes: int, zero_stage: int
) -> None:
    whole, parts = make_config("whole", 24), make_config("parts", 24)
    for config in (whole, parts):
        config.trainer.zero_stage = zero_stage
    assert run_training(whole, processes=processes).is_ok
    expected = curve(Path(whole.output))
    assert [line["step"] for line in expected] == list(range(1, 25))
    assert sum(line["contrastive"] > 0 for line in expected) > 5
    for fault, step in interrupt_at_random(processes, 24, 10):
        check_interruption(run_training(parts, fault, step=step, processes=processes), fault)
    assert run_training(parts, processes=processes).is_ok
    assert curve(Path(parts.output)) == expected
    assert checkpoints(Path(parts.output)) == ["step_18", "step_21", "step_24"]
    load_model(parts.output)


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_alike(run_training: Callable, make_config: Callable) -> None:
    """2 -> 1 -> 4 processes with ZeRO 2 -> 2 -> 3, against 2 processes all the time."""
    whole, parts = make_config("whole", 9), make_config("parts", 9)
    for config in (whole, parts):
        config.model.llm.lora_dropout = 0.0
        config.loss.weights["contrastive"] = 0.0
        config.trainer.global_batch_size = 4
        config.trainer.learning_rate = 1e-4
    assert run_training(whole, processes=2).is_ok
    for processes, zero_stage, last in ((2, 2, 3), (1, 2, 6), (4, 3, 9)):
        parts.trainer.zero_stage = zero_stage
        done = run_training(parts, "SIGTERM" if last < 9 else "", step=last, processes=processes)
        assert done.codes == [EXIT_PREEMPTED if last < 9 else 0] * processes, done.output
    expected, got = curve(Path(whole.output)), curve(Path(parts.output))
    for before, after in zip(expected, got, strict=True):
        for term in ("seg", "bce", "dice", "total"):
            assert after[term] == pytest.approx(before[term], rel=1e-6, abs=1e-6), (before["step"], term)
    assert json.loads((Path(parts.output) / "run.json").read_text())["resumed"][-1]["world_size"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_master_weights_of_bfloat16_are_kept(run_training: Callable, make_config: Callable, zero_stage: int) -> None:
    """The model's own copies are their rounding, and not stored."""
    whole, parts = make_config("whole", 4), make_config("parts", 4)
    for config in (whole, parts):
        config.model.precision = Precision.bf16
        config.trainer.zero_stage = zero_stage
    assert run_training(whole).is_ok
    check_interruption(run_training(parts, "SIGTERM", step=2), "SIGTERM")
    assert run_training(parts).is_ok
    assert curve(Path(parts.output)) == curve(Path(whole.output))
    masters = load_file(Path(parts.output) / "checkpoints" / "step_4" / "trained.safetensors")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())


@pytest.mark.slow
def test_the_mixture_drawn_is_recorded_beside_the_one_asked_for(
    run_training: Callable, make_config: Callable, tiny_vocabulary: Vocabulary
) -> None:
    """Two datasets, two processes, and an interruption in between."""
    config = make_config("run", 6)
    item = config.data.mixture.pop("shapes")
    for name, weight in (("often", 3.0), ("seldom", 1.0)):
        config.data.mixture[name] = MixtureItem(replace(item.dataset, name=name), weight)
    first = run_training(config, "SIGTERM", step=4, processes=2)
    assert "mixture asked for: often 75.0%, seldom 25.0%" in first.outputs[0]
    assert run_training(config, processes=2).is_ok
    glus = build_glus(config.model)
    tokenizer = LlavaChat(tiny_vocabulary, glus.mllm.tokens_per_frame)
    mixture = build_mixture(config.data, config.frames, tokenizer, glus.mllm.prepare, config.trainer.seed)
    drawn = [mixture[number].object_keys[0][0].dataset for number in range(6 * config.trainer.global_batch_size)]
    assert 0 < drawn.count("seldom") < drawn.count("often")
    for line in curve(Path(config.output)):
        seen = drawn[: line["step"] * config.trainer.global_batch_size]
        for name in ("often", "seldom"):
            assert line[f"mixture/{name}"] == pytest.approx(seen.count(name) / len(seen)), line["step"]


@pytest.mark.slow
def test_queues_of_two_ranks_are_merged_for_one(run_training: Callable, make_config: Callable) -> None:
    config = make_config("run", 6)
    run_training(config, "SIGTERM", step=4, processes=2)
    assert run_training(config).is_ok
    assert all("contrastive" in line for line in curve(Path(config.output)))
