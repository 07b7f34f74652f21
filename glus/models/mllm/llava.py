"""LLaVA as LISA and GLUS use it: CLIP's pooled patch features in, LLaMA's states out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from glus import compat, distributed
from glus.models.mllm.attention import NAME, PackedRows, attend
from glus.tokens import IMAGE_ID

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import CLIPVisionModel, LlamaForCausalLM

    from glus.models.mllm.cache import Prefix, PrefixCache

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of openai/clip-vit-large-patch14's preprocessor_config.json."""


def build_vision_tower(architecture: dict[str, Any]) -> CLIPVisionModel:
    """A CLIP vision model with random weights.

    Args:
        architecture: fields of ``transformers.CLIPVisionConfig``.
    """
    compat.prepare_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**architecture))


class ClipEncoder(nn.Module):
    """CLIP patch features, averaged over runs of ``pool`` consecutive patches.

    The pooling is one-dimensional over the raster sequence, before the projector, as in the released GLUS
    (``AvgPool1d`` in llava_arch.py); with 16 patches a row and ``pool=4`` a token is a quarter of a row.

    Args:
        vision_model: the tower.
        select_layer: index into its ``hidden_states``; the layers after it have weights but are not run.
        pool: patches per visual token.

    Raises:
        ValueError: there is no such layer, or the number of patches is not a multiple of ``pool``.
    """

    def __init__(self, vision_model: CLIPVisionModel, select_layer: int, pool: int):
        super().__init__()
        self.vision_model = vision_model
        self.select_layer = select_layer
        num_layers = len(vision_model.encoder.layers)
        if not -num_layers - 1 <= select_layer <= num_layers:
            raise ValueError(f"model.clip.select_layer={select_layer}: the tower has {num_layers} layers")
        self.num_run = select_layer % (num_layers + 1)
        """Layers that are run: ``hidden_states`` begins with the state before the first."""
        self.pool = pool
        config: Any = vision_model.config  # its sizes may be tuples elsewhere; CLIP's are numbers
        self.image_size: int = config.image_size
        self.width: int = config.hidden_size
        num_patches = (config.image_size // config.patch_size) ** 2
        if num_patches % pool:
            raise ValueError(
                f"model.clip.pool={pool}: {num_patches} patches a frame cannot be split into runs of {pool}"
            )
        self.tokens_per_frame = num_patches // pool

    def forward(self, crops_FCss: torch.Tensor) -> torch.Tensor:
        """Features of frames.

        Args:
            crops_FCss: (F, 3, s, s) uint8, RGB.

        Returns:
            (F, P, width) in the tower's dtype.
        """
        # Numbers, not buffers: casting the model to bfloat16 would round them by up to 0.2 %. Not tensors made here
        # either: copying them to a GPU would wait for it.
        scaled = crops_FCss.to(torch.float32) * (1 / 255)
        channels = [(scaled[:, c] - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)]
        pixels = torch.stack(channels, dim=1)
        tower = self.vision_model
        states = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.dtype)))
        for layer in tower.encoder.layers[: self.num_run]:
            states = layer(states, attention_mask=None)
        patches = states[:, 1:]  # without CLS
        return F.avg_pool1d(patches.transpose(1, 2), self.pool, self.pool).transpose(1, 2)


def build_llama(architecture: dict[str, Any], vocab_size: int) -> LlamaForCausalLM:
    """A LLaMA with random weights, the attention of ``models.attention`` and an untied head.

    Its rotary frequencies are plain float32 tensors on the CPU, which move when they are used. As transformers'
    buffers they would be rounded when the model (or DeepSpeed) casts itself to bfloat16, which turns positions far
    into a conversation by whole radians, and they would be lost with ``torch.device("meta")``.

    Args:
        architecture: fields of ``transformers.LlamaConfig``.
        vocab_size: rows of the embedding table and of the head.
    """
    compat.prepare_torchvision()
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    AttentionInterface.register(NAME, attend)
    fixed: dict[str, Any] = dict(
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=NAME,
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


class LanguageModel(nn.Module):
    """Verbs over a LLaMA: states of spliced conversations, logits where they are wanted.

    Args:
        llama: the model, with or without LoRA adapters.
    """

    def __init__(self, llama: LlamaForCausalLM):
        super().__init__()
        self.llama = llama
        self.width: int = llama.config.hidden_size
        self._is_compiled = False

    def states(self, input_ids_NL: torch.Tensor, placeholders_M: torch.Tensor, visual_MD: torch.Tensor) -> torch.Tensor:
        """Final states (after the last RMSNorm) of whole conversations: (N, L, D).

        Args:
            input_ids_NL: int64, right-padded; ``tokens.IMAGE_ID`` where a visual token goes.
            placeholders_M: see ``splice``.
            visual_MD: visual tokens of all rows, in the order of their placeholders (row by row).

        Raises:
            ValueError: the number of visual tokens differs from that of the placeholders.
        """
        embeds_NLD = self.splice(input_ids_NL, placeholders_M, visual_MD)
        positions_1L = torch.arange(input_ids_NL.shape[1], device=embeds_NLD.device)[None]
        return self._run(embeds_NLD, positions_1L)  # causal: nothing sees the padding behind it

    def packed_states(self, embeds_BLD: torch.Tensor, positions_BL: torch.Tensor, packed: PackedRows) -> torch.Tensor:
        """Final states of packed conversations; each is the state that ``states`` gives the conversation by itself.

        Args:
            embeds_BLD: spliced embeddings, one row per video, see ``structures.Batch``.
            positions_BL: int64, position of each token in its own conversation.
            packed: the conversations.

        Returns:
            (B, L, D).
        """
        return self._run(embeds_BLD, positions_BL, packed=packed)

    def continued_states(
        self,
        embeds_NLD: torch.Tensor,
        positions_NL: torch.Tensor,
        prefixes: Sequence[Prefix],
        sees_NLL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final states (N, L, D) of tokens that follow others; their keys and values are not kept.

        Args:
            embeds_NLD: spliced embeddings of the new tokens.
            positions_NL: int64, their positions counted from the beginning of the conversation.
            prefixes: what the N sequences continue, the oldest first; all of it is attended to.
            sees_NLL: bool, which new tokens each new token attends to; each at least one. None: itself and those
                before it.
        """
        cache = _prefix_cache(prefixes, keep=False)
        mask_N1LA = None if sees_NLL is None else _additive(sees_NLL, cache.get_seq_length(), embeds_NLD.dtype)
        return self._run(embeds_NLD, positions_NL, mask_N1LA, past_key_values=cache)

    def prefill(self, embeds_NLD: torch.Tensor, positions_NL: torch.Tensor, prefixes: Sequence[Prefix] = ()) -> Prefix:
        """Keys and values of tokens that others will continue; see ``continued_states``."""
        cache = _prefix_cache(prefixes, keep=True)
        self._run(embeds_NLD, positions_NL, past_key_values=cache)
        return cache.prefix

    def _run(
        self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        self._move_rotary(embeds.device)
        # Compiled layers are for training: a cache of prefixes would have to be compiled for each of its shapes.
        is_eager = self._is_compiled and "past_key_values" in options
        with torch.compiler.set_stance("force_eager") if is_eager else nullcontext():
            hidden = self.llama.model(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, **options
            )
        return hidden.last_hidden_state

    def _move_rotary(self, device: torch.device) -> None:
        """Move the rotary frequencies once: copied in every pass, a GPU would be waited for in every pass."""
        rotary = self.llama.model.rotary_emb
        if device.type != "meta":
            rotary.inv_freq = rotary.inv_freq.to(device)

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

        Code is made when a layer first runs, and once more for what that did not cover. Inference stays as
        it is: there compiled layers took as long, and minutes to make.

        Raises:
            ValueError: no code can be made here.
        """
        compat.check_compiler(distributed.device())  # where training moves the model before it runs
        self._is_compiled = True
        for layer in self.llama.model.layers:
            layer.compile(dynamic=True)

    def splice(self, input_ids_NL: torch.Tensor, placeholders_M: torch.Tensor, visual_MD: torch.Tensor) -> torch.Tensor:
        """Token embeddings with visual tokens at their placeholders: (N, L, D).

        Args:
            input_ids_NL: int64, ``tokens.IMAGE_ID`` where a visual token goes.
            placeholders_M: int64, where that is, row by row (``tokens.placeholders``). Given, not looked for: a number
                of tokens that depends on values would be waited for on a GPU.
            visual_MD: in the order of their placeholders.

        Raises:
            ValueError: there are more or fewer visual tokens than placeholders.
        """
        if len(placeholders_M) != len(visual_MD):
            raise ValueError(f"{len(placeholders_M)} image placeholders but {len(visual_MD)} visual tokens")
        embeds_NLD = self.llama.model.embed_tokens(input_ids_NL.masked_fill(input_ids_NL == IMAGE_ID, 0))
        flat = embeds_NLD.flatten(0, 1).index_copy(0, placeholders_M, visual_MD.to(embeds_NLD.dtype))
        return flat.unflatten(0, input_ids_NL.shape)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., V) of states (..., D)."""
        return self.llama.lm_head(states)


def _additive(sees_NLL: torch.Tensor, num_seen: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the scores of tokens that see ``num_seen`` earlier ones besides: (N, 1, L, num_seen + L)."""
    hidden_NLA = F.pad(~sees_NLL, (num_seen, 0))
    return torch.zeros_like(hidden_NLA, dtype=dtype).masked_fill_(hidden_NLA, -torch.inf)[:, None]


def _prefix_cache(prefixes: Sequence[Prefix], keep: bool) -> PrefixCache:
    from glus.models.mllm.cache import PrefixCache

    return PrefixCache(prefixes, keep)
