"""Training from end to end with a tiny model: it learns something, repeats itself, and stops where it must."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glus.config import Offload
from glus.models.build import trainable_names
from glus.models.pretrained import build_glus, load_model
from glus.models.segmenter.sam2 import Sam2Segmenter
from glus.train.checkpoint import list_checkpoints, read_state
from tests.integration.conftest import read_metrics
from tests.programs import load_script, run_program


def losses(folder: Path) -> list[float]:
    return [line["total"] for line in read_metrics(folder) if "total" in line]


def test_ranks_that_would_wait_for_each_other_are_refused(
    tiny_train_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, check = tiny_train_config(), load_script("train").check_ranks
    config.trainer.zero_stage, config.model.family = 3, "qwen3_vl"
    check(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"zero_stage=3: expected 2 .* model\.family=qwen3_vl"):
        check(config)
    config.model.family = "internvl"
    check(config)


def test_every_job_of_a_sweep_trains_as_it_would_alone(tiny_overrides: list[str], tmp_path: Path) -> None:
    """B1, B2. One after the other in one process, each in a folder of its own; the last as the first."""
    overrides = [
        *tiny_overrides,
        *("data.num_workers=0", "trainer.steps=2", "trainer.global_batch_size=1", "trainer.micro_batch_size=1"),
        *("trainer.warmup_steps=1", "output=run"),
    ]
    done = run_program("scripts/train.py", "-m", *overrides, "trainer.seed=0,1,0", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = [losses(tmp_path / "run" / str(number)) for number in range(3)]
    assert [len(curve) for curve in curves] == [2, 2, 2]
    assert curves[0] == curves[2] != curves[1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_exactly_the_declared_tensors_change(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path, checkpointing: bool
) -> None:
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.gradient_checkpointing = checkpointing
    done = run_training(config)
    assert done.is_ok, done.output[-6000:]
    torch.manual_seed(config.trainer.seed)
    before = build_glus(config.model)
    after = load_model(tmp_path / "run").glus
    declared = set(trainable_names(before))
    assert declared
    changed = {
        name
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if name in declared and not torch.equal(old, new)
    }
    never = {name for name in declared if any(part in name for part in Sam2Segmenter.NEVER_UPDATED)}
    assert never
    assert changed == declared - never


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_weight_decay_is_the_same_with_and_without_gradients(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path, zero_stage: int
) -> None:
    """In every ZeRO stage: a missing gradient counts as zero."""
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.zero_stage, config.trainer.weight_decay = zero_stage, 10.0
    assert run_training(config).is_ok
    torch.manual_seed(config.trainer.seed)
    before = dict(build_glus(config.model).named_parameters())
    after = dict(load_model(tmp_path / "run").glus.named_parameters())
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run")]
    left = math.prod(1 - rate * config.trainer.weight_decay for rate in rates)
    assert left < 0.99
    for name in (name for name in before if name.startswith(Sam2Segmenter.NEVER_UPDATED)):
        torch.testing.assert_close(after[name], left * before[name], msg=name)


def test_run_folder_and_repetition(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    for name in ("first", "second"):
        config = tiny_train_config(output=str(tmp_path / name))
        done = run_training(config)
        assert done.is_ok, done.output[-6000:]
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    run = json.loads((tmp_path / "first" / "run.json").read_text())
    assert {"commit", "versions", "command", "world_size"} <= set(run)
    assert (tmp_path / "first" / "config.yaml").is_file()
    assert [line["step"] for line in read_metrics(tmp_path / "first")] == [1, 2, 3]
    assert not any("mfu" in line for line in read_metrics(tmp_path / "first"))  # nobody knows a CPU's peak
    assert {"seg", "bce", "dice", "contrastive", "learning_rate", "grad_norm", "seconds"} <= set(
        read_metrics(tmp_path / "first")[0]
    )


def test_two_processes_with_evaluation(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.micro_batch_size = 1
    config.valid = config.data.mixture["shapes"].dataset
    config.trainer.eval_max_videos = 2
    config.trainer.eval_every = 2
    done = run_training(config, processes=2)
    assert done.is_ok, done.output[-6000:]
    scores = [line for line in read_metrics(tmp_path / "run") if "valid/J&F" in line]
    assert [line["step"] for line in scores] == [2, 3]
    assert all(0 <= line["valid/J"] <= 100 for line in scores)
    load_model(tmp_path / "run")


def test_two_processes_shard_parameters(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.micro_batch_size = 1
    config.trainer.zero_stage = 3
    done = run_training(config, processes=2)
    assert done.is_ok, done.output[-6000:]
    load_model(tmp_path / "run")  # strict: every trained tensor is there, whole


def test_offline_wandb_beside_metrics(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.wandb.enabled = True
    config.trainer.wandb.mode = "offline"
    done = run_training(config)
    assert done.is_ok, done.output[-6000:]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(losses(tmp_path / "run")) == 3


def test_non_finite_loss_stops_and_names_term_and_samples(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path
) -> None:
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.loss.weights["bce"] = float("inf")
    done = run_training(config)
    assert done.codes == [1]
    assert "loss term 'bce' is inf at step 1 on rank 0; samples: shapes_train/" in done.output


@pytest.mark.parametrize("timed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deepspeed_never_waits_for_the_device(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path, timed: bool
) -> None:
    """As its own timer would, twice per micro-batch, once two steps are done; a program that ends leaves its group."""
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.steps = 4
    timer = {"timers": {"throughput": {"enabled": True}}} if timed else {}
    done = run_training(config, "tell_of_waits", step=3, deepspeed=timer)
    assert done.is_ok, done.output
    assert done.output.count("DeepSpeed waits for the device") == (4 if timed else 0)
    assert "process group: left" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path, zero_stage: int
) -> None:
    """By its fused code, and counts them."""
    curves = {}
    for offload in (Offload.none, Offload.optimizer):
        config = tiny_train_config(output=str(tmp_path / offload.value))
        config.trainer.zero_stage, config.trainer.offload, config.trainer.micro_batch_size = zero_stage, offload, 1
        done = run_training(config, "SIGTERM", step=2, processes=2)
        assert done.codes == [75, 75], done.output
        done = run_training(config, processes=2)
        assert done.is_ok, done.output
        curves[offload] = losses(tmp_path / offload.value)
        assert read_state(list_checkpoints(tmp_path / offload.value)[-1])["updates"] == config.trainer.steps
    assert curves[Offload.optimizer] == pytest.approx(curves[Offload.none], rel=1e-5)
