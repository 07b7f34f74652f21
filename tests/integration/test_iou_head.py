"""Training with the IoU head gives the same model as without it, and a head that has learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glus.config import TrainConfig
from glus.models.pretrained import TRAINED_FILE, load_model
from tests.integration.conftest import read_metrics

STEPS = 30


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_train_config: Callable[..., TrainConfig], run_training: Callable
) -> dict[bool, Path]:
    """Run folders by whether the model has the head. Gradients are not clipped: the head's count in their norm."""
    folders = {}
    for has_head in (False, True):
        folders[has_head] = tmp_path_factory.mktemp(f"head_{has_head}")
        config = tiny_train_config(output=str(folders[has_head]))
        config.trainer.steps, config.trainer.max_grad_norm = STEPS, 1e9
        config.model.iou_head = has_head
        config.loss.weights["iou"] = 0.1 if has_head else 0.0
        done = run_training(config)
        assert done.is_ok, done.output
    return folders


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{STEPS}" / TRAINED_FILE)


def test_all_else_learns_the_same(runs: dict[bool, Path]) -> None:
    with_head, without = trained(runs[True]), trained(runs[False])
    assert {name for name in with_head.keys() - without.keys()} == {
        f"iou_head.fc{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }
    for name, value in without.items():
        assert torch.equal(with_head[name], value), name
    losses = [[record["total"] - record.get("iou", 0) for record in read_metrics(runs[head])] for head in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_head_learns_and_its_checkpoint_loads(runs: dict[bool, Path]) -> None:
    losses = [record["iou"] for record in read_metrics(runs[True])]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    head = load_model(runs[True]).glus.iou_head
    assert head is not None
    for name, value in head.state_dict().items():
        assert torch.equal(value, trained(runs[True])[f"iou_head.{name}"])
    assert load_model(runs[False]).glus.iou_head is None
