"""Quantised language models: what is refused without a GPU; the rest runs in tests/gpu."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from glus.config import Quantization, SettingsConfig
from glus.models.build import LoadedModel, build_glus, load_model, save_model
from glus.models.language import LanguageModel, build_llama
from glus.models.quantization import Quantizer, check_quantization
from tests.conftest import tiny_model_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.nf4])
def test_without_a_gpu_it_is_refused_before_anything_is_loaded(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_model_config(tmp_path, vocab_size=32)
    config.llm.quantization = quantization
    config.llm.weights = "nowhere"
    with pytest.raises(ValueError, match=rf"model.llm.quantization={quantization.value} needs a GPU"):
        build_glus(config)


def test_a_missing_bitsandbytes_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'glus\[quantization\]'"):
        check_quantization(Quantization.nf4, GPU)


def test_a_prediction_may_ask_for_it(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tensors = tiny_model.glus.state_dict()
    save_model(tmp_path / "model", tensors, tiny_model.config, tiny_model.vocabulary, metadata={})
    with pytest.raises(ValueError, match=r"llm\.quantization=int8 needs a GPU"):
        load_model(tmp_path / "model", settings=SettingsConfig(llm_quantization=Quantization.int8))


def test_trained_layers_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = LanguageModel(build_llama(sizes, vocab_size=32))
    with pytest.raises(ValueError, match=r"names the part 'llm', whose layers \(0\.self_attn\.q_proj, ...\)"):
        Quantizer(language.llama, Quantization.nf4, CPU)
