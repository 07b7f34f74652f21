"""One micro-batch through the real network, forwards and backwards, on the meta device: shapes without values.

Nothing is computed, so a full-size network is traced on a laptop in seconds, and whatever the network does is what is
counted: every tensor that comes to life and goes again, and every matrix product.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from glus.batch import Batch, Conversation, TrainSample
from glus.config import TrainConfig
from glus.data.loader import collate
from glus.losses.objective import TERMS, GlusObjective
from glus.models.glus import Glus
from glus.models.pretrained import build_glus
from glus.tokens import IMAGE_ID
from glus.train.measure import attention_counts

PARTS = ("CLIP", "LLM", "SAM2 image encoder", "SAM2 memory and decoder")
REST = "losses and the rest"
FRAME_SIZE = (720, 1280)
"""Height and width that losses are computed at: Ref-YouTube-VOS and most of MeViS."""
EXPRESSION_TOKENS = 10
"""SentencePiece length of a middling sentence."""
SYSTEM_TOKENS, CONTEXT_TOKENS, TURN_TOKENS = 34, 11, 26
"""LLaMA's tokens of the texts of ``data/prompts.py``: before the frames, after the context, and around a sentence."""


@dataclass(frozen=True)
class Trace:
    """What one micro-batch needs of one process."""

    flops: dict[str, float]
    """Part -> operations of matrix products (a multiplication and an addition are two), forwards and backwards."""
    kept: dict[str, float]
    """Part -> bytes of activations alive when the forward pass is over: what the backward pass reads."""
    peak: float
    """Bytes alive at most, without weights, and with each parameter's gradient gone as soon as it is made."""
    tokens: int
    """Positions the LLM reads, padding included."""


def example_batch(config: TrainConfig, tokens_per_frame: int, crop_side: int, num_videos: int) -> Batch:
    """A batch of the config's sizes: black frames, sentences of ``EXPRESSION_TOKENS``, as many as may be drawn."""
    context, query, count = config.frames.num_context, config.frames.num_query, config.data.expressions_per_video
    sample = TrainSample(
        context_pixels=np.zeros((context, crop_side, crop_side, 3), np.uint8),
        query_pixels=np.zeros((query, crop_side, crop_side, 3), np.uint8),
        query_frames=np.zeros((query, *FRAME_SIZE, 3), np.uint8),
        conversations=[_conversation(context, query, tokens_per_frame, 1 + row) for row in range(count)],
        target_masks=[np.zeros((query, *FRAME_SIZE), np.uint8)] * count,
        object_keys=[],
        names=[],
    )
    return collate([sample] * num_videos, pad_id=0)


def _conversation(num_context: int, num_query: int, tokens_per_frame: int, word: int) -> Conversation:
    """Lengths as of real text; all words of its turns are ``word``, so that another sentence differs from there on."""
    image = np.array([0, *[IMAGE_ID] * tokens_per_frame, 0])  # between its start and end tokens
    opening = [np.zeros(SYSTEM_TOKENS), *[image] * num_context, np.zeros(CONTEXT_TOKENS if num_context else 0)]
    turn = np.concatenate([image, np.full(TURN_TOKENS + EXPRESSION_TOKENS, word)])
    input_ids = np.concatenate([*opening, *[turn] * num_query]).astype(np.int64)
    return Conversation(input_ids, len(input_ids) - 2 - len(turn) * np.arange(num_query)[::-1])


class LikeOnGpu(TorchFunctionMode):
    """What the meta device would do otherwise than a GPU: attention that writes no matrix of scores, and conditions
    on values, which are answered as for a batch with padding."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _flash_attention(*args, **(kwargs or {}))
        if func is torch.Tensor.__bool__ and args[0].device.type == "meta":
            return False
        return func(*args, **(kwargs or {}))


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


class CostCounter(TorchDispatchMode):
    """Bytes of the tensors alive, and operations, by the part that is at work.

    Parts are told apart by few hooks, not by ``torch.utils.module_tracker``, whose hooks keep recomputed activations
    alive.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.part = REST
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.peak = 0
        attention = {kernel: shape_wrapper(count) for kernel, count in attention_counts().items()}
        self._counts: dict[Any, Callable[..., int]] = {**flop_registry, **attention}
        self._device = device
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in self._counts:
            self.flops[self.part] += self._counts[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes.total())
        return result

    def ignore(self, tensors: list[torch.Tensor]) -> None:
        """Do not count these: they are there whatever happens."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def switch(self, part: str) -> Callable[..., None]:
        """A hook after which ``part`` is at work."""

        def hook(*_: object) -> None:
            self.part = part

        return hook

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size, part = storage._cdata, storage.nbytes(), self.part
        if key in self._known:
            return
        self._known.add(key)
        self.bytes[part] += size
        weakref.finalize(storage, self._forget, key, size, part)

    def _forget(self, key: int, size: int, part: str) -> None:
        self._known.discard(key)
        self.bytes[part] -= size


def trace_micro_batch(config: TrainConfig, num_videos: int, checkpointing: bool) -> Trace:
    """Count what one micro-batch costs.

    Args:
        config: of the run; the contrastive term, whose tensors are tiny, is left out, and quantised weights are traced
            as what they are computed with.
        num_videos: of the micro-batch.
        checkpointing: recompute the LLM's layers in the backward pass.
    """
    with torch.device("meta"):
        glus = build_glus(config.model, load_weights=False).train()
    if checkpointing:
        glus.mllm.checkpoint_gradients()
    weights = {name: weight for name, weight in config.loss.weights.items() if name in TERMS}
    batch = example_batch(config, glus.mllm.tokens_per_frame, glus.mllm.clip.image_size, num_videos)
    with LikeOnGpu(), torch.device("meta"):
        return count_costs(glus, GlusObjective(weights, seg_id=0), batch.to("meta"))


def count_costs(glus: Glus, objective: GlusObjective, batch: Batch) -> Trace:
    """Run a micro-batch forwards and backwards and count what happens, on whatever device the batch is.

    Gradients of parameters are dropped as soon as they are made, as ZeRO does. In the backward pass, what comes before
    the gradient of the [SEG] embeddings is the decoder's, and what follows is the LLM's.
    """
    counter = CostCounter(batch.rows.input_ids_BL.device)
    counter.ignore([*glus.parameters(), *glus.buffers()])
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in glus.parameters()
        if parameter.requires_grad
    ]
    sam = glus.segmenter.sam
    parts: dict[str, tuple[nn.Module, ...]] = {
        PARTS[0]: (glus.mllm.clip,),
        PARTS[1]: (glus.mllm.llama.model,),
        PARTS[2]: (sam.image_encoder,),
        PARTS[3]: (sam.memory_encoder, sam.sam_mask_decoder.transformer),
    }
    for part, modules in parts.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(counter.switch(part)))
            if part != PARTS[3]:  # which also computes outside its modules, up to the losses
                hooks.append(module.register_forward_hook(counter.switch(REST)))
    with counter:
        output = glus(batch)
        counter.part = REST
        losses = objective(output, batch, objective.counts([batch]), np.random.default_rng(0))
        kept = {part: float(counter.bytes[part]) for part in (*PARTS, REST)}
        output.seg_embeds_NQC.register_hook(counter.switch("LLM"))
        counter.part = PARTS[3]
        run_backward(losses["total"])
    for hook in hooks:
        hook.remove()
    flops = {part: float(counter.flops[part]) for part in (*PARTS, REST)}
    return Trace(flops, kept, float(counter.peak), batch.rows.input_ids_BL.numel())


def run_backward(loss: torch.Tensor) -> None:
    """As ``loss.backward()``, which however suspends function modes, so that recomputed layers would escape
    ``LikeOnGpu``."""
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
