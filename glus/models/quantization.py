"""The language model's frozen weights in 8 or 4 bits, by bitsandbytes: the only file that imports it. GPU only."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glus.config import Quantization

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

INSTALL = "pip install 'glus[quantization]'"


def check_quantization(quantization: Quantization, device: torch.device) -> None:
    """Raise unless linear layers can be quantised on ``device``.

    Raises:
        ValueError: there is no GPU, or bitsandbytes is not installed.
    """
    wanted = f"model.llm.quantization={quantization.value}"
    if device.type != "cuda":
        raise ValueError(f"{wanted} needs a GPU, here there is none: set it (or inference.llm_quantization) to none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{wanted} needs bitsandbytes, which is not installed: {INSTALL}")


def quantize_llama(llama: LlamaForCausalLM, quantization: Quantization, device: torch.device) -> None:
    """Store the projections of every layer in fewer bits, in place and on ``device``; embeddings, norms, head and
    adapters stay as they are. To be called after everything is loaded: what was quantised takes no weights any more.

    Args:
        llama: with or without LoRA adapters; their base layers are quantised.
        quantization: ``int8`` (LLM.int8, Dettmers et al. 2022) or ``nf4`` (QLoRA, Dettmers et al. 2023, with double
            quantisation); computed with in the dtype the weights have now.
        device: of the quantised weights.

    Raises:
        ValueError: a projection is trained, which integers cannot be.
    """
    linears = {
        name: module
        for name, module in llama.model.layers.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    trained = [name for name, module in linears.items() if module.weight.requires_grad]
    if trained:
        raise ValueError(
            f"model.llm.quantization={quantization.value}: model.trainable names the part 'llm', whose layers "
            f"({trained[0]}, ...) would be quantised; train 'lora' instead, or set the quantisation to none"
        )
    for name, module in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(llama.model.layers.get_submodule(parent), child, _quantized(module, quantization, device))


def _quantized(linear: nn.Linear, quantization: Quantization, device: torch.device) -> nn.Module:
    """A layer that takes the place of ``linear``."""
    import bitsandbytes as bnb

    has_bias, dtype = linear.bias is not None, linear.weight.dtype
    sizes = (linear.in_features, linear.out_features, has_bias)
    weight = linear.weight.detach()
    layer: Any
    if quantization is Quantization.int8:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    if has_bias:
        layer.bias = linear.bias
    return layer.to(device)  # which quantises
