"""The language model: build it, give it LoRA, splice visual tokens into its input, read states and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glus import compat, distributed
from glus.models.packing import packed_attention, packed_positions
from glus.models.reading import Past, Place, read, rms_norm
from glus.tokens import IMAGE_ID

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaForCausalLM


def build_llama(architecture: dict[str, Any], vocab_size: int) -> LlamaForCausalLM:
    """A LLaMA with random weights, SDPA attention and an untied head.

    Its rotary frequencies are plain float32 tensors on the CPU, which move when they are used. As transformers'
    buffers they would be rounded when the model (or DeepSpeed) casts itself to bfloat16, which turns positions far
    into a conversation by whole radians, and they would be lost with ``torch.device("meta")``.

    Args:
        architecture: fields of ``transformers.LlamaConfig``.
        vocab_size: rows of the embedding table and of the head.
    """
    compat.prepare_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fixed: dict[str, Any] = dict(
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    config = LlamaConfig(**architecture, **fixed)
    llama = LlamaForCausalLM(config)
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(config)
    for name, frequencies in list(rotary.named_buffers()):
        delattr(rotary, name)
        setattr(rotary, name, frequencies.detach().clone())  # no longer of type nn.Buffer
    llama.model.rotary_emb = rotary
    return llama


def rotary_frequencies(architecture: dict[str, Any]) -> torch.Tensor:
    """Radians per position of each pair of a head's channels: (head width / 2,) float32, on the CPU.

    Args:
        architecture: fields of ``transformers.LlamaConfig``.
    """
    compat.prepare_torchvision()
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("cpu"):
        return LlamaRotaryEmbedding(LlamaConfig(**architecture)).inv_freq.detach().clone()


def add_lora(llama: LlamaForCausalLM, rank: int, alpha: int, dropout: float, targets: list[str]) -> None:
    """Put LoRA adapters into the named projections, in place; the module names of the LLM stay.

    Args:
        rank: rank of the adapters.
        alpha: their scale is ``alpha / rank``.
        dropout: before the down projection, in training.
        targets: names of linear layers, such as ``q_proj``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    inject_adapter_in_model(config, llama)


def plain_names(module: nn.Module) -> dict[str, str]:
    """Names of a model's tensors as they were before ``add_lora`` -> as they are; the adapters' own are left out."""
    names = [name for name in module.state_dict() if ".lora_" not in name]
    return {name.replace(".base_layer.", "."): name for name in names}


def merged_weight(adapter: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """What a projection's weight becomes when its adapter is merged: ``W + B A alpha / rank``, a new tensor."""
    (name,) = adapter.active_adapters
    adapter.lora_A[name].to(weight.dtype)
    adapter.lora_B[name].to(weight.dtype)
    delta: torch.Tensor = adapter.get_delta_weight(name)  # type: ignore[attr-defined]  # of every linear one
    return weight + delta.detach().to(weight)


def merge_lora(llama: LlamaForCausalLM) -> None:
    """Add every adapter to the projection it adapts (``W += B A alpha / rank``) and take the adapters out, in place.

    Raises:
        ValueError: a projection is quantised; its steps are coarser than what adapters learn.
    """
    from peft.tuners.lora import LoraLayer

    adapters = [(name, module) for name, module in llama.named_modules() if isinstance(module, LoraLayer)]
    for name, adapter in adapters:
        dtype = adapter.get_base_layer().weight.dtype
        if not dtype.is_floating_point:
            raise ValueError(
                f"{name} is stored as {str(dtype).removeprefix('torch.')}: merging would round the adapter away; "
                "load the base model unquantised, then merge"
            )
    for name, adapter in adapters:
        adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(llama.get_submodule(parent), child, adapter.get_base_layer())


class LanguageModel(nn.Module):
    """Verbs over a LLaMA: states of spliced conversations, logits where they are wanted.

    Args:
        llama: the model, with or without LoRA adapters.
    """

    def __init__(self, llama: LlamaForCausalLM):
        super().__init__()
        self.llama = llama
        self.width: int = llama.config.hidden_size

    def states(
        self, input_ids_NL: torch.Tensor, attention_mask_NL: torch.Tensor, visual_MD: torch.Tensor
    ) -> torch.Tensor:
        """Final states (after the last RMSNorm) of conversations.

        Args:
            input_ids_NL: int64, right-padded; ``tokens.IMAGE_ID`` where a visual token goes.
            attention_mask_NL: bool, False on padding.
            visual_MD: visual tokens of all rows, in the order of their placeholders (row by row).

        Returns:
            (N, L, D).

        Raises:
            ValueError: the number of visual tokens differs from that of the placeholders.
        """
        hidden = self.llama.model(
            inputs_embeds=self.splice(input_ids_NL, visual_MD), attention_mask=attention_mask_NL, use_cache=False
        )
        return hidden.last_hidden_state

    def packed_states(
        self, input_ids_BL: torch.Tensor, segments_BL: torch.Tensor, visual_MD: torch.Tensor
    ) -> torch.Tensor:
        """Final states of packed conversations; each is the state that ``states`` gives the conversation by itself.

        Args:
            input_ids_BL: int64, one row per video, see ``structures.Batch``.
            segments_BL: int64, which conversation each token belongs to.
            visual_MD: visual tokens of all rows, in the order of their placeholders (row by row).

        Returns:
            (B, L, D).
        """
        embeds_BLD = self.splice(input_ids_BL, visual_MD)
        self._move_rotary(embeds_BLD.device)
        hidden = self.llama.model(
            inputs_embeds=embeds_BLD,
            attention_mask=packed_attention(segments_BL, embeds_BLD.dtype),
            position_ids=packed_positions(segments_BL),
            use_cache=False,
        )
        return hidden.last_hidden_state

    def _move_rotary(self, device: torch.device) -> None:
        """Move the rotary frequencies once: copied in every pass, a GPU would be waited for in every pass."""
        rotary = self.llama.model.rotary_emb
        if device.type != "meta":
            rotary.inv_freq = rotary.inv_freq.to(device)

    def extend(
        self,
        embeds_NLD: torch.Tensor,
        positions_NL: torch.Tensor,
        reads_NR: torch.Tensor | None = None,
        sees_NLL: torch.Tensor | None = None,
        past: Sequence[Past] = (),
    ) -> tuple[torch.Tensor | None, Past]:
        """Read tokens that follow others, for inference.

        The last layer is run only where states are read; of the others its keys and values alone are needed.

        Args:
            embeds_NLD: spliced embeddings of the new tokens.
            positions_NL: int64, their positions counted from the beginning of the conversation.
            reads_NR: int64, the new tokens whose states are wanted, by place; None: no states.
            sees_NLL: bool, which new tokens each new token attends to; each at least one. None: itself and those
                before it. All tokens of the past are attended to.
            past: what the N sequences continue, the oldest first.

        Returns:
            Final states (N, R, D) or None, and keys and values of the new tokens alone.
        """
        n, length = positions_NL.shape
        device = embeds_NLD.device
        self._move_rotary(device)
        if sees_NLL is None:
            sees_NLL = torch.ones(n, length, length, dtype=torch.bool, device=device).tril()
        seen = torch.ones(n, length, sum(p.length for p in past), dtype=torch.bool, device=device)
        sees_NLA = torch.cat([seen, sees_NLL], dim=2)
        mask_NLA = torch.zeros(sees_NLA.shape, dtype=embeds_NLD.dtype, device=device)
        mask_NLA.masked_fill_(~sees_NLA, -torch.inf)
        llama = self.llama.model
        cos, sin = (part.chunk(2, dim=-1)[0] for part in llama.rotary_emb(embeds_NLD, position_ids=positions_NL))
        states_NRD, new = read(llama.layers, embeds_NLD, Place(cos, sin, mask_NLA), past, reads_NR)
        return None if states_NRD is None else rms_norm(llama.norm, states_NRD), new

    def checkpoint_gradients(self, on: bool = True) -> None:
        """From now on, recompute each layer in the backward pass instead of keeping its activations; or no more."""
        # transformers 5.23 renamed these verbs and warns of the old names, which are the only ones before.
        renamed = hasattr(self.llama, "activation_checkpointing_enable")
        prefix = "activation_checkpointing" if renamed else "gradient_checkpointing"
        if on:
            getattr(self.llama, f"{prefix}_enable")({"use_reentrant": False})
        else:
            getattr(self.llama, f"{prefix}_disable")()

    def compile_layers(self) -> None:
        """From now on, each layer runs as what ``torch.compile`` makes of it, in training; names of tensors stay.

        Code is made when a layer first runs, and once more for what that did not cover. Inference (``extend``) runs the
        layers' parts by itself and stays as it is: there compiled layers took as long, and minutes to make.

        Raises:
            ValueError: no code can be made here.
        """
        compat.check_compiler(distributed.device())  # where training moves the model before it runs
        for layer in self.llama.model.layers:
            layer.compile(dynamic=True)

    def splice(self, input_ids_NL: torch.Tensor, visual_MD: torch.Tensor) -> torch.Tensor:
        """Token embeddings with visual tokens at their placeholders: (N, L, D)."""
        is_image_NL = input_ids_NL == IMAGE_ID
        embeds_NLD = self.llama.model.embed_tokens(input_ids_NL.masked_fill(is_image_NL, 0))
        # masked_scatter raises by itself when there are too few tokens; too many would pass in silence. The count is
        # compared on the CPU only, where reading it costs no synchronisation.
        if is_image_NL.device.type == "cpu" and int(is_image_NL.sum()) != len(visual_MD):
            raise ValueError(f"{int(is_image_NL.sum())} image placeholders but {len(visual_MD)} visual tokens")
        return embeds_NLD.masked_scatter(is_image_NL[..., None], visual_MD.to(embeds_NLD.dtype))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., V) of states (..., D)."""
        return self.llama.lm_head(states)
