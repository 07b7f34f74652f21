"""What all families share: a text model of transformers with its head, read in rows of tokens, adapted, and trained.

Transformers' models call ``attend`` through their ``AttentionInterface``, and keep the keys and values of prefixes that
many prompts share in a ``Cache`` of ours. There are three patterns, each by the fastest kernel that knows it, and only
the last one needs a matrix of scores:

- tokens that follow each other and all of a prefix: causal;
- packed conversations (``TokenRows``): each is gathered from its row, prefix included, and attends causally;
- prompts whose endings branch off: a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from glus import compat, distributed
from glus.batch import TokenRows
from glus.config import Quantization
from glus.models.mllm.adapters import NewRows, NewRowsEmbedding, NewRowsHead, Quantizer, check_quantization
from glus.tokens import IMAGE_ID

NAME = "glus"
"""Of the attention function, for transformers' ``attn_implementation``."""
KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one layer: (R, key heads, L, d) each."""


class PackedRows(NamedTuple):
    """The paths of packed rows; see ``TokenRows``."""

    paths_NC: torch.Tensor
    slots_BL: torch.Tensor


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: PackedRows | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend, as an attention function of transformers.

    Args:
        module: the attention layer.
        query: (B, heads, L, d), rotary positions applied.
        key: (B, key heads, A, d); the last L of the A tokens are those of ``query``.
        value: likewise.
        attention_mask: (B, 1, L, A), added to the scores; None: causal.
        dropout: of the attention weights.
        scaling: of the scores; None: 1 / sqrt(d).
        packed: the rows hold these conversations; then A = L, and there is no mask.

    Returns:
        (B, L, heads, d), and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if packed is not None:
        query, key, value = (_gathered(heads, packed.paths_NC) for heads in (query, key, value))
    is_causal = attention_mask is None
    if is_causal and query.shape[2] < key.shape[2]:
        continued = causal_by_mask if query.device.type == "cpu" else causal_by_padding
        attended = continued(query, key, value, dropout, scaling)
    else:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=is_causal, scale=scaling
        )
    attended = attended.transpose(1, 2)
    if packed is not None:
        slots = packed.slots_BL
        attended = attended.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape)
    return attended, None


def causal_by_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """Attend from the last of the keys' tokens: square causal attention with queries before them that nobody reads.

    It is what every GPU has a fast kernel for (flash), which a mask would rule out.
    """
    length, num_seen = query.shape[2], key.shape[2]
    padded = F.pad(query, (0, 0, num_seen - length, 0))
    attended = F.scaled_dot_product_attention(padded, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return attended[:, :, -length:]


def causal_by_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """The same by a mask, one for all sequences: on a CPU a quarter faster (all of the small model's LLM)."""
    length, num_seen = query.shape[2], key.shape[2]
    hidden = torch.ones(length, num_seen, dtype=torch.bool, device=query.device).triu(num_seen - length + 1)
    mask = torch.zeros(length, num_seen, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


def _gathered(heads_BhLd: torch.Tensor, tokens_NL: torch.Tensor) -> torch.Tensor:
    """(N, heads, Lc, d): the tokens of each conversation."""
    tokens = heads_BhLd.transpose(1, 2).flatten(0, 1)  # no copy: so they lie in memory
    return tokens.index_select(0, tokens_NL.flatten()).unflatten(0, tokens_NL.shape).transpose(1, 2)


def additive_mask(sees_BLL: torch.Tensor, num_seen: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the scores of tokens that see ``num_seen`` earlier ones besides: (B, 1, L, num_seen + L)."""
    hidden_BLA = F.pad(~sees_BLL, (num_seen, 0))
    return torch.zeros_like(hidden_BLA, dtype=dtype).masked_fill_(hidden_BLA, -torch.inf)[:, None]


def with_visual(states_BLD: torch.Tensor, rows: TokenRows, visual_TD: torch.Tensor) -> torch.Tensor:
    """A copy that holds visual tokens at their placeholders."""
    visual_MD = visual_TD[rows.visual_index_M].to(states_BLD.dtype)
    return states_BLD.flatten(0, 1).index_copy(0, rows.placeholders_M, visual_MD).unflatten(0, states_BLD.shape[:2])


@dataclass(frozen=True)
class Prefix:
    """Keys and values of tokens that later tokens continue, one pair per layer.

    ``rows`` says which of the R rows each later sequence continues: (N,) int64. None: all continue the only row.
    """

    layers: list[KeysValues]
    rows: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[2]

    def of_rows(self, rows: torch.Tensor) -> Prefix:
        """The same prefix for sequences that continue other rows."""
        return Prefix(self.layers, rows)

    def continued(self, layer: int, count: int) -> KeysValues:
        """A layer's keys and values, one row for each of ``count`` sequences."""
        keys, values = self.layers[layer]
        if self.rows is None:
            return keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)


class PrefixCache(Cache):
    """Gives each layer the prefixes' keys and values before the new ones, and stores new ones only to be continued.

    Those of a whole batch of prompts would take four times the memory of all else that reading them takes.

    Args:
        prefixes: the oldest first.
        keep: whether the new tokens are to be continued: ``prefix``.
    """

    def __init__(self, prefixes: Sequence[Prefix], keep: bool):
        super().__init__(layers=[])
        self._new: list[KeysValues] = []
        self._prefixes = prefixes
        self._keep = keep

    @property
    def prefix(self) -> Prefix:
        """The new tokens, to be continued."""
        return Prefix(self._new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        """The layer's keys and values of all tokens, the new ones last."""
        if self._keep:
            self._new.append((key_states, value_states))
        seen = [prefix.continued(layer_idx, len(key_states)) for prefix in self._prefixes]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen, (key_states, value_states), strict=True))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that are continued."""
        return sum(prefix.length for prefix in self._prefixes)


def llm_parts(prefix: str, owner_prefix: str) -> dict[str, tuple[str, ...]]:
    """What ``Mllm.PARTS`` has of an LLM; the arguments are those of ``Decoder``."""
    return {
        "lora": (".lora_A.", ".lora_B."),
        "embeddings": (f"{prefix}embed_tokens.",),
        "lm_head": (f"{owner_prefix}lm_head.",),
        "embeddings_new_rows": (f"{prefix}embed_tokens.new_rows",),
        "lm_head_new_rows": (f"{owner_prefix}lm_head.new_rows",),
        "llm": (prefix, f"{owner_prefix}lm_head."),
    }


def join_configs(
    config_class: Any, net_class: Any, vision: dict[str, Any], text: dict[str, Any], vocab_size: int, is_tied: bool
) -> Any:
    """A network of transformers, tower and LLM, with random weights, whose LLM attends by ``attend``.

    Args:
        config_class: of the whole network, made of ``vision_config`` and ``text_config``.
        net_class: what it configures.
        vision: fields of the tower's config.
        text: fields of the text model's config, but for the following.
        vocab_size: rows of the embedding table and of the head.
        is_tied: the head is the table.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    config = config_class(
        vision_config=dict(vision),
        text_config={**text, "vocab_size": vocab_size, "tie_word_embeddings": is_tied, "use_cache": False},
        tie_word_embeddings=is_tied,
    )
    net = net_class(config)
    net.set_attn_implementation({"text_config": NAME, "vision_config": "sdpa"})
    return net


def plain_rotary(rotary: nn.Module) -> nn.Module:
    """The same rotary embedding, its frequencies plain float32 tensors on the CPU, which move when they are used.

    As transformers' buffers they would be rounded when the model (or DeepSpeed) casts itself to bfloat16, which turns
    positions far into a conversation by whole radians, and they would be lost with ``torch.device("meta")``.

    Args:
        rotary: of transformers, made from its ``config`` alone.
    """
    with torch.device("cpu"):
        fresh = type(rotary)(rotary.config)
    for name, frequencies in list(fresh.named_buffers()):
        delattr(fresh, name)
        setattr(fresh, name, frequencies.detach().clone())  # no longer of type nn.Buffer
    return fresh


def move_rotary(rotary: nn.Module, device: torch.device) -> None:
    """Move the rotary frequencies once: copied in every pass, a GPU would be waited for in every pass."""
    if device.type != "meta":
        rotary.inv_freq = rotary.inv_freq.to(device)  # type: ignore[operator]


@contextmanager
def only_for(tokens_R: torch.Tensor, module: nn.Module) -> Iterator[None]:
    """Let a module read these tokens (of all rows) alone, and give 0 for the others.

    It is for the end of the last layer, as nobody reads the other states there: of the small model's prompts all but
    one in ninety. That spares a fifth of the products of its four layers, and 2 % of those of LLaMA-7B's 32.

    Args:
        tokens_R: int64, indices into the B * L tokens of all rows.
        module: (B, L, C) -> (B, L, D), each token by itself; one call in the block.
    """
    shape = torch.Size()

    def choose(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal shape
        shape = inputs[0].shape[:2]
        return (inputs[0].flatten(0, 1).index_select(0, tokens_R),)

    def spread(_: nn.Module, __: tuple[torch.Tensor], output_RD: torch.Tensor) -> torch.Tensor:
        zeros = output_RD.new_zeros(shape.numel(), output_RD.shape[1])
        return zeros.index_copy_(0, tokens_R, output_RD).unflatten(0, shape)

    hooks = module.register_forward_pre_hook(choose), module.register_forward_hook(spread)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Decoder:
    """A text model and its head. It holds no parameters of its own, so that names of tensors are the family's.

    Args:
        text: of transformers, with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb`` (see ``plain_rotary``),
            and the attention that is called ``NAME``.
        owner: has the head, ``lm_head``.
        prefix: how names of ``text``'s tensors begin in the whole network.
        owner_prefix: how those of ``owner``'s do.
        is_tied: the head is the embedding table.
    """

    def __init__(self, text: nn.Module, owner: nn.Module, prefix: str, owner_prefix: str, is_tied: bool = False):
        self.text: Any = text
        self.owner: Any = owner
        self.prefix, self.owner_prefix = prefix, owner_prefix
        self.is_tied = is_tied
        self._is_compiled = False
        self.tie()

    @property
    def vocab_size(self) -> int:
        """Rows of the tables."""
        return len(self.text.embed_tokens.weight)

    @property
    def max_length(self) -> int:
        """Tokens of a conversation that it can read."""
        return int(self.text.config.max_position_embeddings)

    def tie(self) -> None:
        """Make the head the embedding table again, where it is to be, after either has got new tensors."""
        if self.is_tied:
            self.owner.lm_head.weight = self.text.embed_tokens.weight

    def splice(self, rows: TokenRows, visual_TD: torch.Tensor) -> torch.Tensor:
        """Token embeddings with visual tokens at their placeholders: (B, L, D)."""
        ids_BL = rows.input_ids_BL
        return with_visual(self.text.embed_tokens(ids_BL.masked_fill(ids_BL == IMAGE_ID, 0)), rows, visual_TD)

    def states(
        self,
        rows: TokenRows,
        embeds_BLD: torch.Tensor,
        past: Sequence[Prefix],
        keep: bool,
        positions: torch.Tensor | None = None,
        **own: Any,
    ) -> tuple[torch.Tensor, Prefix | None]:
        """See ``Mllm.states``; states are those after the last norm.

        Args:
            rows: see there.
            embeds_BLD: what ``splice`` gives.
            past: see there.
            keep: see there.
            positions: as the text model takes them; default: those of the rows.
            own: what this text model takes besides.
        """
        options: dict[str, Any] = dict(own)
        if past or keep:
            options["past_key_values"] = PrefixCache(past, keep)
        if rows.paths_NC is not None and rows.slots_BL is not None:
            options["packed"] = PackedRows(rows.paths_NC, rows.slots_BL)
        if rows.sees_BLL is not None:
            seen = sum(prefix.length for prefix in past)
            options["attention_mask"] = additive_mask(rows.sees_BLL, seen, embeds_BLD.dtype)
        options["position_ids"] = rows.position_ids_BL if positions is None else positions
        last = self.text.layers[-1]
        with ExitStack() as stack:
            for module in (last.self_attn.o_proj, last.mlp) if past or keep else ():
                stack.enter_context(only_for(rows.reads_R, module))
            hidden_BLD = self._run(embeds_BLD, **options)
        prefix = options["past_key_values"].prefix if keep else None
        return hidden_BLD.flatten(0, 1).index_select(0, rows.reads_R), prefix

    def _run(self, embeds: torch.Tensor, **options: Any) -> torch.Tensor:
        move_rotary(self.text.rotary_emb, embeds.device)
        # Compiled layers are for training: a cache of prefixes would have to be compiled for each of its shapes.
        is_eager = self._is_compiled and "past_key_values" in options
        with torch.compiler.set_stance("force_eager") if is_eager else nullcontext():
            hidden = self.text(inputs_embeds=embeds, use_cache=False, **options)
        return hidden.last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., V) of states (..., D)."""
        return self.owner.lm_head(states)

    def split_embeddings(self, ids: Sequence[int]) -> None:
        """Make the rows ``ids`` of the embedding table parameters of their own, in place."""
        self.text.embed_tokens = NewRowsEmbedding(self.text.embed_tokens.weight, ids)

    def split_head(self, ids: Sequence[int]) -> None:
        """Make the rows ``ids`` of the head parameters of their own, in place."""
        self.owner.lm_head = NewRowsHead(self.owner.lm_head.weight, ids)

    def quantize(self, quantization: Quantization, device: torch.device) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """Make room in the layers for projections in fewer bits.

        Returns:
            What makes of each tensor, by its name in the whole network, what the model holds in its place.

        Raises:
            ValueError: they cannot be here, or they are trained.
        """
        check_quantization(quantization, device)
        return Quantizer(self.text.layers, f"{self.prefix}layers.", quantization, device).pack

    def complete(self) -> None:
        """Give the rows of the tables that are trained apart their values, from the tables."""
        self.tie()
        for table in (self.text.embed_tokens, self.owner.lm_head):
            if isinstance(table, NewRows) and table.new_rows.is_meta:
                table.reset()

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Whether the backward pass computes the layers' activations again, which are then not kept."""
        # transformers 5.23 renamed these verbs and warns of the old names, which are the only ones before.
        renamed = hasattr(self.text, "activation_checkpointing_enable")
        prefix = "activation_checkpointing" if renamed else "gradient_checkpointing"
        if on:
            getattr(self.text, f"{prefix}_enable")({"use_reentrant": False})
        else:
            getattr(self.text, f"{prefix}_disable")()

    def compile_layers(self) -> None:
        """Let ``torch.compile`` make the layers' code, for training: when a layer first runs, and again for what that
        did not cover. Inference stays as it is: there compiled layers took as long, and minutes to make.

        Raises:
            ValueError: no code can be made here.
        """
        compat.check_compiler(distributed.device())  # where training moves the model before it runs
        # Else, on GPUs, dropout that is computed again has generators of its own, which no seed of a step reaches.
        torch._functorch.config.graphsafe_rng_functionalization = False
        self._is_compiled = True
        for layer in self.text.layers:
            layer.compile(dynamic=True)
