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


class Quantizer:
    """Makes room for quantised projections in a LLaMA without memory, and quantises each weight as it arrives.

    So the LLM is never on the GPU unquantised. Embeddings, norms, head and adapters stay as they are.

    Args:
        llama: with or without LoRA adapters, whose base layers are quantised, in the type that they are computed with
            in. Projections on the meta device wait for their weights, others are quantised at once.
        quantization: ``int8`` (LLM.int8, Dettmers et al. 2022) or ``nf4`` (QLoRA, Dettmers et al. 2023, with double
            quantisation).
        device: of the quantised weights.

    Raises:
        ValueError: a projection is trained, which integers cannot be.
    """

    def __init__(self, llama: LlamaForCausalLM, quantization: Quantization, device: torch.device):
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
        self._device = device
        self._layers: dict[str, Any] = {}
        for name, linear in linears.items():
            parent, _, child = name.rpartition(".")
            layer = _empty_layer(linear, quantization)
            setattr(llama.model.layers.get_submodule(parent), child, layer)
            full = f"language.llama.model.layers.{name}.weight"
            self._layers[full] = layer
            if not linear.weight.is_meta:
                layer.weight = self.pack(full, linear.weight.detach())

    def pack(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A weight as the model stores it: quantised on the device if it is a projection's, else as it is."""
        layer = self._layers.get(name)
        if layer is None:
            return value
        # From the CPU: there alone an 8-bit weight knows that it is not quantised yet.
        weight = type(layer.weight)(value.cpu(), **_options(layer))
        return weight.to(self._device)  # which quantises


def _empty_layer(linear: nn.Linear, quantization: Quantization) -> nn.Module:
    """A layer that takes the place of ``linear``, whose weight it waits for."""
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    layer: Any
    if quantization is Quantization.int8:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
    else:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
    layer.weight = type(layer.weight)(linear.weight.detach(), **_options(layer))
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer


def _options(layer: Any) -> dict[str, Any]:
    """What a weight of the layer is made with."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        return {"requires_grad": False, "has_fp16_weights": False}
    return {"requires_grad": False, "quant_type": "nf4", "module": layer}
