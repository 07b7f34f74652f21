"""Programs that run a large model refuse to do so on a CPU, before they read or build anything, unless told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glus.config import (
    DatasetConfig,
    LlmConfig,
    ModelConfig,
    ModelFolderConfig,
    PredictConfig,
    ScoreFramesConfig,
    TrainConfig,
    to_yaml,
)
from glus.inference import predictor
from glus.inference.segment import segment
from glus.models.pretrained import COMPLETE_FILE, CONFIG_FILE
from tests.inference.asking import ArrayVideo
from tests.programs import load_script

LARGE = ModelConfig(llm=LlmConfig(vocab_size=32004, tokenizer="nowhere"))
"""LLaMA-7B."""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose driver is too old."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("script", "function", "schema"),
    [("predict", "predict", PredictConfig), ("score_frames", "choose_key_frames", ScoreFramesConfig)],
)
def test_a_large_model_predicts_on_a_cpu_only_if_told_to(
    monkeypatch: pytest.MonkeyPatch, script: str, function: str, schema: type, tmp_path: Path
) -> None:
    def read_expressions(dataset: DatasetConfig) -> None:
        raise RuntimeError("on its way")

    (tmp_path / COMPLETE_FILE).touch()
    (tmp_path / CONFIG_FILE).write_text(to_yaml(ModelFolderConfig(LARGE)))
    program = load_script(script)
    monkeypatch.setattr(program, "read_expressions", read_expressions)
    run = getattr(program, function)
    config = schema(dataset=DatasetConfig(name="none"), weights=str(tmp_path), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no usable GPU, and an LLM of 6\.7 billion parameters .* allow_cpu=true"):
        run(config)
    config.allow_cpu = True
    with pytest.raises(RuntimeError, match="on its way"):
        run(config)


def test_a_large_model_segments_a_video_on_a_cpu_only_if_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_model(*_: object, **__: object) -> None:
        raise RuntimeError("on its way")

    (tmp_path / COMPLETE_FILE).touch()
    (tmp_path / CONFIG_FILE).write_text(to_yaml(ModelFolderConfig(LARGE)))
    monkeypatch.setattr(predictor, "load_model", load_model)
    with pytest.raises(ValueError, match=r"no usable GPU, and an LLM of 6\.7 billion parameters .* --allow-cpu"):
        segment(ArrayVideo(3), ["the red circle"], tmp_path)
    with pytest.raises(RuntimeError, match="on its way"):
        segment(ArrayVideo(3), ["the red circle"], tmp_path, allow_cpu=True)


def test_a_large_model_trains_on_a_cpu_only_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    train = load_script("train")
    monkeypatch.setattr(train, "init_distributed", lambda minutes: None)
    monkeypatch.setattr(train, "build_and_fit", lambda config: True)
    config = TrainConfig(model=LARGE, output="nowhere")
    with pytest.raises(ValueError, match=r"no usable GPU, and an LLM of 6\.7 billion parameters .* allow_cpu=true"):
        train.train(config)
    config.allow_cpu = True
    assert train.train(config) == 0
