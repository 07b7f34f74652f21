"""What all families share: a text model of transformers with its head, read in rows of tokens, adapted, and trained.

A ``Decoder`` holds no parameters of its own, so that names of tensors are the family's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from glus import compat, distributed
from glus.batch import TokenRows
from glus.config import Quantization
from glus.models.mllm.adapters import (
    NewRows,
    NewRowsEmbedding,
    NewRowsHead,
    Quantizer,
    add_lora,
    check_quantization,
)
from glus.models.mllm.attention import PackedRows, Prefix, PrefixCache, additive_mask
from glus.tokens import IMAGE_ID


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
    """A text model and its head.

    Args:
        text: of transformers, with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb`` (see ``plain_rotary``),
            and the attention of ``attention.NAME``.
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
    def head_name(self) -> str:
        """Of the head's weight, in the whole network."""
        return f"{self.owner_prefix}lm_head.weight"

    @property
    def vocab_size(self) -> int:
        """Rows of the tables."""
        return len(self.text.embed_tokens.weight)

    def tie(self) -> None:
        """Make the head the embedding table again, where it is to be, after either has got new tensors."""
        if self.is_tied:
            self.owner.lm_head.weight = self.text.embed_tokens.weight

    def splice(self, rows: TokenRows, visual_TD: torch.Tensor) -> torch.Tensor:
        """Token embeddings with visual tokens at their placeholders: (B, L, D)."""
        ids_BL = rows.input_ids_BL
        embeds_BLD = self.text.embed_tokens(ids_BL.masked_fill(ids_BL == IMAGE_ID, 0))
        visual_MD = visual_TD[rows.visual_index_M].to(embeds_BLD.dtype)
        return embeds_BLD.flatten(0, 1).index_copy(0, rows.placeholders_M, visual_MD).unflatten(0, ids_BL.shape)

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

    def add_lora(self, rank: int, alpha: int, dropout: float, targets: list[str]) -> None:
        """See ``adapters.add_lora``."""
        add_lora(self.text, rank, alpha, dropout, targets)

    def split_embeddings(self, ids: Sequence[int]) -> None:
        """Make the rows ``ids`` of the embedding table parameters of their own, in place."""
        self.text.embed_tokens = NewRowsEmbedding(self.text.embed_tokens.weight, ids)

    def split_head(self, ids: Sequence[int]) -> None:
        """Make the rows ``ids`` of the head parameters of their own, in place."""
        self.owner.lm_head = NewRowsHead(self.owner.lm_head.weight, ids)

    def quantize(self, quantization: Quantization, device: torch.device) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """See ``Mllm``.

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
        """See ``Mllm``."""
        # transformers 5.23 renamed these verbs and warns of the old names, which are the only ones before.
        renamed = hasattr(self.text, "activation_checkpointing_enable")
        prefix = "activation_checkpointing" if renamed else "gradient_checkpointing"
        if on:
            getattr(self.text, f"{prefix}_enable")({"use_reentrant": False})
        else:
            getattr(self.text, f"{prefix}_disable")()

    def compile_layers(self) -> None:
        """See ``Mllm``. Code is made when a layer first runs, and once more for what that did not cover. Inference
        stays as it is: there compiled layers took as long, and minutes to make.

        Raises:
            ValueError: no code can be made here.
        """
        compat.check_compiler(distributed.device())  # where training moves the model before it runs
        self._is_compiled = True
        for layer in self.text.layers:
            layer.compile(dynamic=True)
