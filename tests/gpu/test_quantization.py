"""A language model in 8 and 4 bits: it answers nearly as before, adapters learn over it, and merging is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from glus.config import Precision, Quantization, SettingsConfig
from glus.models.mllm.adapters import Quantizer, add_lora
from glus.models.mllm.llava import build_llama
from glus.models.pretrained import LoadedModel, load_model, save_model
from tests.merging import merge_lora

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
FEWER_BYTES = {Quantization.int8: 1.9, Quantization.nf4: 3.4}
"""How many times smaller a bfloat16 projection becomes at least (4 bits also keep a scale per 64 values)."""


def _llama() -> Any:
    torch.manual_seed(0)
    llama = build_llama(SIZES, vocab_size=64).bfloat16()
    add_lora(llama, 4, 8, 0.0, ["q_proj", "v_proj"])
    for name, parameter in llama.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    llama.model.rotary_emb.inv_freq = llama.model.rotary_emb.inv_freq.to(DEVICE)  # a plain tensor, which Llava moves
    return llama.bfloat16().to(DEVICE)


def _states(llama: Any) -> torch.Tensor:
    ids = torch.arange(1, 41, device=DEVICE).view(2, 20)
    return llama.model(input_ids=ids, use_cache=False).last_hidden_state


def _bytes(llama: Any) -> int:
    return sum(p.nbytes for n, p in llama.model.layers.named_parameters() if "_proj" in n and "lora" not in n)


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.nf4])
def test_states_stay_close_and_adapters_learn(quantization: Quantization) -> None:
    llama = _llama()
    before, size = _states(llama), _bytes(llama)
    Quantizer(llama.model.layers, "", quantization, DEVICE)
    after = _states(llama)
    assert size / _bytes(llama) > FEWER_BYTES[quantization]
    assert torch.nn.functional.cosine_similarity(before, after, dim=-1).min() > 0.9
    adapters = [p for n, p in llama.named_parameters() if ".lora_" in n]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    target = torch.randn_like(after)
    losses = []
    for _ in range(20):
        loss = (_states(llama) - target).float().square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="merging would round the adapter away"):
        merge_lora(llama)


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.nf4])
def test_a_stored_model_is_loaded_quantised(
    tiny_model: LoadedModel, quantization: Quantization, tmp_path: Path
) -> None:
    glus = copy.deepcopy(tiny_model.glus)
    save_model(tmp_path / "m", glus.state_dict(), tiny_model.config, tiny_model.vocabulary, metadata={})
    loaded = load_model(tmp_path / "m", Precision.bf16, SettingsConfig(llm_quantization=quantization))
    weights = {n: p for n, p in loaded.glus.named_parameters() if "_proj" in n and "mllm.llama.model" in n}
    assert {p.dtype for n, p in weights.items() if "lora" not in n} <= {torch.int8, torch.uint8}
    assert loaded.glus.mllm.llama.lm_head.weight.dtype is torch.bfloat16
