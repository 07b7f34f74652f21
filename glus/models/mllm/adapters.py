"""What is trained of the LLM in place of its tables, and its frozen weights in fewer bits.

The whole tables of a 7 B LLM are 2 x 131 M parameters, each with a gradient and two moments; the rows of the four added
tokens are 2 x 16 k. The released GLUS trains the whole tables. Weights in 8 or 4 bits are made by bitsandbytes, which
this file alone imports, on a GPU only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from glus.config import Quantization

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


OUTLIER = 6.0
"""Columns of activations that are larger somewhere are multiplied in 16 bits (Dettmers et al., LLM.int8); bitsandbytes
alone would multiply all in 8."""


class NewRows(nn.Module):
    """A table whose rows ``ids`` are parameters of their own, ``new_rows``; those in ``weight`` are not read.

    Args:
        weight: (V, D) the table; frozen here.
        ids: of the new rows; each differs.
    """

    def __init__(self, weight: nn.Parameter, ids: Sequence[int]):
        super().__init__()
        self.ids = tuple(ids)
        self.weight: nn.Parameter = weight
        self.weight.requires_grad_(False)
        self.new_rows = nn.Parameter(weight.detach()[list(ids)].clone())

    def reset(self) -> None:
        """Take the new rows from the table, which was loaded."""
        self.new_rows = nn.Parameter(self.weight.detach()[list(self.ids)].clone(), self.new_rows.requires_grad)

    def with_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of the table ``weight`` that has the new rows."""
        merged = weight.clone()
        merged[list(self.ids)] = self.new_rows.detach().to(weight)
        return merged


class NewRowsEmbedding(NewRows):
    """Takes the place of an ``nn.Embedding``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., D)."""
        slots = torch.full_like(ids, -1)
        for slot, token in enumerate(self.ids):  # comparisons with numbers: an index tensor would have to be copied
            slots = torch.where(ids == token, slot, slots)
        new = F.embedding(slots.clamp(min=0), self.new_rows)
        return torch.where((slots >= 0)[..., None], new, F.embedding(ids, self.weight))


class NewRowsHead(NewRows):
    """Takes the place of an ``nn.Linear`` without bias."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        logits, new = F.linear(states, self.weight), F.linear(states, self.new_rows)
        for slot, token in enumerate(self.ids):
            logits[..., token] = new[..., slot]
        return logits


def add_lora(llm: nn.Module, rank: int, alpha: int, dropout: float, targets: list[str]) -> None:
    """Put LoRA adapters with their first values into the named projections, in place; the LLM's module names stay.

    Args:
        rank: rank of the adapters.
        alpha: their scale is ``alpha / rank``.
        dropout: before the down projection, in training.
        targets: names of linear layers, such as ``q_proj``.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    inject_adapter_in_model(config, llm)
    for layer in (module for module in llm.modules() if isinstance(module, LoraLayer)):
        for name, down in layer.lora_A.items():
            if down.weight.is_meta:  # peft leaves adapters there with the layers they adapt
                down.to_empty(device=torch.get_default_device())
                layer.lora_B[name].to_empty(device=torch.get_default_device())
                layer.reset_lora_parameters(name, init_lora_weights=True)


def second_names(module: nn.Module) -> set[str]:
    """Names of parameters that have another name before: of a head that is the embedding table."""
    every = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return set(every) - dict(module.named_parameters()).keys()


def plain_names(module: nn.Module) -> dict[str, str]:
    """Names of a model's tensors as they were before ``add_lora`` -> as they are; the adapters' own are left out, and
    so are second names."""
    again = second_names(module)
    names = [name for name in module.state_dict() if ".lora_" not in name and name not in again]
    return {name.replace(".base_layer.", "."): name for name in names}


def merged_weight(adapter: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """What a projection's weight becomes when its adapter is merged: ``W + B A alpha / rank``, a new tensor."""
    (name,) = adapter.active_adapters
    adapter.lora_A[name].to(weight.dtype)
    adapter.lora_B[name].to(weight.dtype)
    delta: torch.Tensor = adapter.get_delta_weight(name)  # type: ignore[attr-defined]  # of every linear one
    return weight + delta.detach().to(weight)


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
    """Makes room for quantised projections in an LLM without memory, and quantises each weight as it arrives.

    So the LLM is never on the GPU unquantised. Embeddings, norms, head and adapters stay as they are.

    Args:
        layers: of the LLM, with or without LoRA adapters, whose base layers are quantised, in the type that they are
            computed with in. Projections on the meta device wait for their weights, others are quantised at once.
        prefix: how names of the layers' tensors begin in the whole network.
        quantization: ``int8`` (LLM.int8, Dettmers et al. 2022) or ``nf4`` (QLoRA, Dettmers et al. 2023, with double
            quantisation).
        device: of the quantised weights.

    Raises:
        ValueError: a projection is trained, which integers cannot be.
    """

    def __init__(self, layers: nn.Module, prefix: str, quantization: Quantization, device: torch.device):
        linears = {
            name: module
            for name, module in layers.named_modules()
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
            setattr(layers.get_submodule(parent), child, layer)
            full = f"{prefix}{name}.weight"
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
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIER, device="meta")
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
