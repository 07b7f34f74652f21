"""One optimizer step gives the same losses and gradients however it is cut: micro-batches, ranks, ZeRO stages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glus.config import Offload, TrainConfig, to_yaml

WORKER = Path(__file__).with_name("step_worker.py")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run_step(tmp_path_factory: pytest.TempPathFactory, tiny_train_config: Callable[..., TrainConfig]) -> Callable:
    """Runs the worker on some processes and returns what rank 0 wrote."""

    def run(name: str, processes: int, **trainer: object) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp(name)
        config = tiny_train_config(output=str(folder))
        config.loss.weights["contrastive"] = 0.0
        for key, value in {"global_batch_size": 4, "warmup_steps": 0, **trainer}.items():
            setattr(config.trainer, key, value)
        (folder / "config.yaml").write_text(to_yaml(config))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, str(WORKER), str(folder / "config.yaml"), str(folder / "out.pt")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(folder / "out.pt", weights_only=True)

    return run


@pytest.fixture(scope="module")
def reference(run_step: Callable) -> dict[str, dict]:
    """One process, one micro-batch of four videos, ZeRO-2."""
    return run_step("reference", 1, micro_batch_size=4, zero_stage=2)


@pytest.mark.parametrize(
    ("processes", "micro_batch_size", "zero_stage", "offload"),
    [
        (2, 1, 2, "none"),
        (1, 4, 3, "none"),
        (2, 2, 3, "parameters"),
        pytest.param(1, 1, 2, "none", marks=pytest.mark.slow),
        pytest.param(2, 2, 2, "none", marks=pytest.mark.slow),
        pytest.param(2, 2, 3, "none", marks=pytest.mark.slow),
        pytest.param(2, 1, 2, "optimizer", marks=pytest.mark.slow),
    ],
)
def test_same_step(
    run_step: Callable, reference: dict, processes: int, micro_batch_size: int, zero_stage: int, offload: str
) -> None:
    name = f"p{processes}_m{micro_batch_size}_z{zero_stage}_{offload}"
    settings = {"micro_batch_size": micro_batch_size, "zero_stage": zero_stage, "offload": Offload(offload)}
    got = run_step(name, processes, **settings)
    for term, value in reference["losses"].items():
        assert got["losses"][term] == pytest.approx(value, rel=TOLERANCE), term
    assert set(got["gradients"]) == set(reference["gradients"])
    largest = max(float(gradient.abs().max()) for gradient in reference["gradients"].values())
    assert largest > 0
    for parameter, expected in reference["gradients"].items():
        scale = float(expected.abs().max())
        difference = float((got["gradients"][parameter] - expected).abs().max())
        # Gradients that are zero but for rounding (biases of keys) are compared against the largest of all.
        assert difference <= TOLERANCE * max(scale, 1e-3 * largest), parameter
