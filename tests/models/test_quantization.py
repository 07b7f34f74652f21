"""Quantised language models: when they are quantised, what is refused without a GPU; the rest runs in tests/gpu."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glus.config import Quantization, SettingsConfig
from glus.models.mllm import decoder
from glus.models.mllm.adapters import Quantizer, check_quantization
from glus.models.mllm.llava import build_llama
from glus.models.pretrained import LoadedModel, build_glus, load_model, merged_tensors, save_model
from tests.conftest import tiny_model_config


class Packed(nn.Parameter):
    """Stands in for a weight of bitsandbytes: quantises itself when it is brought to a device."""

    alive = 0
    most_alive = 0

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **_: Any) -> Packed:
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        if data.device.type != "meta" and data.is_floating_point():
            Packed.alive += 1
            Packed.most_alive = max(Packed.most_alive, Packed.alive)
            weakref.finalize(made, cls.forget)
        return made

    @classmethod
    def forget(cls) -> None:
        Packed.alive -= 1

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_floating_point() and self.device.type != "meta":
            return type(self)((self.detach() * 100).to(torch.uint8))
        return self


class Params4bit(Packed):
    pass


class Int8Params(Packed):
    pass


class Linear4bit(nn.Linear):
    weight_type: type[Packed] = Params4bit

    def __init__(self, inputs: int, outputs: int, bias: bool, device: str, **_: Any):
        super().__init__(inputs, outputs, bias, device)
        self.weight = self.weight_type(self.weight.detach())


class Linear8bitLt(Linear4bit):
    weight_type = Int8Params


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes without a GPU."""
    module = types.ModuleType("bitsandbytes")
    module.nn = types.SimpleNamespace(  # type: ignore[attr-defined]
        Linear4bit=Linear4bit, Linear8bitLt=Linear8bitLt, Params4bit=Params4bit, Int8Params=Int8Params
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(decoder, "check_quantization", lambda quantization, device: None)
    monkeypatch.setattr(Packed, "most_alive", 0)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.nf4])
def test_each_projection_is_quantised_as_it_arrives(
    tiny_model: LoadedModel, quantization: Quantization, tmp_path: Path
) -> None:
    """So that the LLM is nowhere whole and unquantised; where its weights come from is all the same."""
    tensors, config = tiny_model.glus.state_dict(), copy.deepcopy(tiny_model.config)
    save_model(tmp_path / "model", tensors, config, tiny_model.vocabulary, metadata={})
    config.model.weights, config.model.llm.quantization = str(tmp_path / "model"), quantization
    settings = SettingsConfig(llm_quantization=quantization)
    for glus in (load_model(tmp_path / "model", settings=settings).glus, build_glus(config.model)):
        state = glus.state_dict()
        packed = {name for name, value in state.items() if value.dtype is torch.uint8}
        assert len(packed) == 2 * 7
        for name, value in state.items():
            if name in packed:
                assert torch.equal(value, (tensors[name] * 100).to(torch.uint8)), name
            elif ".lora_" not in name:
                assert torch.equal(value, tensors[name]), name
        assert Packed.most_alive == 1
        assert Packed.alive == 0
    with pytest.raises(ValueError, match="is quantised: load the model unquantised, then merge"):
        merged_tensors(LoadedModel(glus, tiny_model.vocabulary, config))


@pytest.mark.usefixtures("library")
def test_what_is_drawn_at_random_is_quantised_too(tiny_model: LoadedModel) -> None:
    config = copy.deepcopy(tiny_model.config.model)
    config.llm.quantization = Quantization.nf4
    state = build_glus(config).state_dict()
    assert sum(value.dtype is torch.uint8 for value in state.values()) == 2 * 7


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
    llama = build_llama(sizes, vocab_size=32)
    with pytest.raises(ValueError, match=r"names the part 'llm', whose layers \(0\.self_attn\.q_proj, ...\)"):
        Quantizer(llama.model.layers, "", Quantization.nf4, CPU)
