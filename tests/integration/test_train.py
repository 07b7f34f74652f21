"""Training from end to end with a tiny model: it learns something, repeats itself, and stops where it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glus.config import TrainConfig, to_yaml
from glus.models.build import NEVER_UPDATED, build_glus, load_model, trainable_names

ROOT = Path(__file__).parents[2]
DRIVER = "import sys; from omegaconf import OmegaConf; from glus.config import *; sys.path.insert(0, 'scripts'); \
import train; train.train(load_config(TrainConfig, OmegaConf.load(sys.argv[1])))"


@pytest.fixture(scope="module")
def run_training(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``scripts/train.py`` with a typed config on some processes."""

    def run(config: TrainConfig, processes: int = 1) -> subprocess.CompletedProcess:
        file = tmp_path_factory.mktemp("config") / "config.yaml"
        file.write_text(to_yaml(config))
        driver = file.with_name("driver.py")
        driver.write_text(DRIVER)
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run([*launcher, str(driver), str(file)], capture_output=True, text=True, env=env, cwd=ROOT)

    return run


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["total"] for line in read_metrics(folder) if "total" in line]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_exactly_the_declared_tensors_change(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path, checkpointing: bool
) -> None:
    config = tiny_train_config(output_dir=str(tmp_path / "run"))
    config.trainer.gradient_checkpointing = checkpointing
    done = run_training(config)
    assert done.returncode == 0, done.stderr[-6000:]
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
    never = {name for name in declared if any(part in name for part in NEVER_UPDATED)}
    assert never
    assert changed == declared - never


def test_run_folder_and_repetition(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    for name in ("first", "second"):
        config = tiny_train_config(output_dir=str(tmp_path / name))
        done = run_training(config)
        assert done.returncode == 0, done.stderr[-6000:]
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    run = json.loads((tmp_path / "first" / "run.json").read_text())
    assert {"commit", "versions", "command", "world_size"} <= set(run)
    assert (tmp_path / "first" / "config.yaml").is_file()
    assert [line["step"] for line in read_metrics(tmp_path / "first")] == [1, 2, 3]
    assert {"seg", "bce", "dice", "contrastive", "learning_rate", "grad_norm", "seconds"} <= set(
        read_metrics(tmp_path / "first")[0]
    )


def test_two_processes_with_evaluation(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    config = tiny_train_config(output_dir=str(tmp_path / "run"))
    config.trainer.micro_batch_size = 1
    config.valid = config.data.mixture["shapes"].dataset
    config.trainer.eval_videos = 2
    config.trainer.eval_every = 2
    done = run_training(config, processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    scores = [line for line in read_metrics(tmp_path / "run") if "valid/J&F" in line]
    assert [line["step"] for line in scores] == [2, 3]
    assert all(0 <= line["valid/J"] <= 100 for line in scores)
    load_model(tmp_path / "run")


def test_two_processes_shard_parameters(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    config = tiny_train_config(output_dir=str(tmp_path / "run"))
    config.trainer.micro_batch_size = 1
    config.trainer.zero_stage = 3
    done = run_training(config, processes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    load_model(tmp_path / "run")  # strict: every trained tensor is there, whole


def test_offline_wandb_beside_metrics(run_training: Callable, tiny_train_config: Callable, tmp_path: Path) -> None:
    config = tiny_train_config(output_dir=str(tmp_path / "run"))
    config.trainer.wandb.enabled = True
    config.trainer.wandb.mode = "offline"
    done = run_training(config)
    assert done.returncode == 0, done.stderr[-6000:]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(losses(tmp_path / "run")) == 3


def test_non_finite_loss_stops_and_names_term_and_samples(
    run_training: Callable, tiny_train_config: Callable, tmp_path: Path
) -> None:
    config = tiny_train_config(output_dir=str(tmp_path / "run"))
    config.loss.weights["bce"] = float("inf")
    done = run_training(config)
    assert done.returncode != 0
    assert "loss term 'bce' is inf at step 1 on rank 0; samples: shapes_train/" in done.stderr
