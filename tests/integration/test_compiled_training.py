"""``trainer.compile``: the same training, on two processes, with LoRA, checkpointing and an evaluation in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from glus import distributed
from glus.config import Quantization, TrainConfig
from glus.train.guards import EXIT_PREEMPTED
from tests.integration.conftest import COST, read_metrics
from tests.programs import load_script


@pytest.fixture
def make_config(tiny_train_config: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    """Four steps of two videos, compiled or not."""

    def make(name: str, dropout: float, compiled: bool = True) -> TrainConfig:
        config = tiny_train_config(output=str(tmp_path / name))
        config.model.llm.lora_dropout = dropout
        config.valid = config.data.mixture["shapes"].dataset
        config.trainer.steps, config.trainer.micro_batch_size = 4, 1
        config.trainer.eval_max_videos, config.trainer.eval_every = 1, 2
        config.trainer.gradient_checkpointing, config.trainer.compile = True, compiled
        return config

    return make


def curve(config: TrainConfig) -> list[dict[str, float]]:
    lines = read_metrics(Path(config.output))
    return [{name: value for name, value in line.items() if name not in COST} for line in lines]


def tensor_names(config: TrainConfig) -> set[str]:
    with safe_open(Path(config.output) / "checkpoints" / "step_4" / "trained.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.slow
def test_compiled_training_is_the_same_training(run_training: Callable, make_config: Callable) -> None:
    plain, compiled = make_config("plain", 0.0, compiled=False), make_config("compiled", 0.0)
    for config in (plain, compiled):
        done = run_training(config, processes=2)
        assert done.is_ok, done.output[-6000:]
    assert tensor_names(compiled) == tensor_names(plain)
    for expected, got in zip(curve(plain), curve(compiled), strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4), expected["step"]


@pytest.mark.slow
def test_an_interrupted_compiled_run_goes_on_bit_for_bit(run_training: Callable, make_config: Callable) -> None:
    whole, parts = make_config("whole", 0.1), make_config("parts", 0.1)
    assert run_training(whole, processes=2).is_ok
    assert run_training(parts, "SIGTERM", step=2, processes=2).codes == [EXIT_PREEMPTED] * 2
    assert run_training(parts, processes=2).is_ok
    assert curve(parts) == curve(whole)


@pytest.mark.parametrize(
    ("setting", "on_gpu", "zero_stage", "quantization", "expected"),
    [
        (None, True, 2, Quantization.none, True),
        (None, True, 0, Quantization.none, True),
        (None, True, 3, Quantization.none, False),
        (None, True, 2, Quantization.nf4, False),
        (None, False, 2, Quantization.none, False),
        (True, False, 2, Quantization.none, True),
        (False, True, 2, Quantization.none, False),
    ],
)
def test_left_open_it_is_on_where_a_gpu_can_have_it(
    tiny_train_config: Callable[..., TrainConfig],
    setting: bool | None,
    on_gpu: bool,
    zero_stage: int,
    quantization: Quantization,
    expected: bool,
) -> None:
    config = tiny_train_config()
    config.trainer.compile, config.trainer.zero_stage, config.model.llm.quantization = setting, zero_stage, quantization
    assert config.is_compiled(on_gpu) is expected


@pytest.mark.parametrize("setting", [None, True])
def test_without_a_compiler_only_who_asks_for_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny_train_config: Callable[..., TrainConfig],
    setting: bool | None,
) -> None:
    def fail() -> None:
        raise ValueError("trainer.compile: no compiler")

    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    config = tiny_train_config()
    config.trainer.compile = setting
    glus = SimpleNamespace(mllm=SimpleNamespace(decoder=SimpleNamespace(compile_layers=fail)))
    compile_layers = load_script("train").compile_layers
    if setting:
        with pytest.raises(ValueError, match="no compiler"):
            compile_layers(glus, config)
    else:
        compile_layers(glus, config)
        assert "without compiled layers, in more time. trainer.compile: no compiler" in caplog.text
