"""From config to network, with no weights but random ones: what is built, and the table of what is trained."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from glus import distributed
from glus.config import FuserGamma, ModelConfig, Precision, Quantization, SegmenterConfig
from glus.models.glus import Glus, IouHead, SegHead
from glus.models.mllm.adapters import add_lora, split_embeddings, split_head
from glus.models.mllm.llava import ClipEncoder, Llava, build_llama, build_projector, build_vision_tower
from glus.models.segmenter.sam2 import Sam2Segmenter, build_sam2
from glus.models.weights import Target
from glus.tokens import Vocabulary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PARTS: dict[str, tuple[str, ...]] = {
    **Llava.PARTS,
    "seg_head": ("seg_head.",),
    "iou_head": ("iou_head.",),
    **Sam2Segmenter.PARTS,
}
"""What ``model.trainable`` may name: part -> substrings of the parameter names it stands for."""

_SPLITS = (("embeddings_new_rows", "embeddings", split_embeddings), ("lm_head_new_rows", "lm_head", split_head))
"""Part of some rows, part of the whole table, and what sets the rows apart."""

RANDOM_STD = 0.02
"""LLaMA's own, of weights that are to be measured with."""
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def build_random(config: ModelConfig, device: torch.device) -> Glus:
    """The network with random weights, to measure it with; CLIP and LLM are drawn where they are to be and in their own
    precision, so that the device needs room for the network alone.

    Args:
        config: sizes, trainable parts; the files that it names are not read.
        device: of the network.
    """
    glus = assemble(config, is_clip_empty=True, is_llm_empty=True)
    for module in glus.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty_like(parameter, device=device)
                is_norm = parameter.dim() == 1 and name in ("weight", "bias")
                nn.init.constant_(value, name == "weight") if is_norm else nn.init.normal_(value, std=RANDOM_STD)
                setattr(module, name, nn.Parameter(value, parameter.requires_grad))
    complete(glus, Target(device))
    return glus.to(device)


def assemble(config: ModelConfig, is_clip_empty: bool = False, is_llm_empty: bool = False) -> Glus:
    """The network at random, its trained parts marked by ``requires_grad``.

    Args:
        config: sizes, trainable parts.
        is_clip_empty: CLIP is left without memory, on the meta device: it will be loaded, and completed.
        is_llm_empty: likewise the LLM, but for its adapters.

    Raises:
        ValueError: ``model.trainable`` names no part.
    """
    clip, llm = config.clip, config.llm
    # What is small and drawn at random comes first: so it is the same whether the large parts are drawn or loaded.
    segmenter = build_segmenter(config.segmenter, memory_gradient=not config.memory.detach)
    projector = build_projector(clip.architecture["hidden_size"], llm.architecture["hidden_size"])
    seg_head = SegHead(llm.architecture["hidden_size"], segmenter.width, config.seg_head_gain)
    with torch.device("meta") if is_clip_empty else nullcontext():
        tower = build_vision_tower(clip.architecture)
    with torch.device("meta") if is_llm_empty else nullcontext():
        llama = build_llama(llm.architecture, llm.vocab_size)
    glus = Glus(
        mllm=Llava(ClipEncoder(tower, clip.select_layer, clip.pool), projector, llama),
        seg_head=seg_head,
        segmenter=segmenter,
        memory_frames=config.memory.num_frames,
        memory_stride=config.memory.stride,
        memory_enabled=config.memory.enabled,
    )
    if config.iou_head:
        with torch.random.fork_rng(devices=[]):  # so that all else starts as it would without
            glus.iou_head = IouHead(glus.mllm.width, glus.segmenter.width)
    if llm.lora_rank:
        add_lora(llama, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, llm.lora_targets)
    _split_new_rows(llama, config)
    mark_trainable(glus, [*config.trainable, *(["iou_head"] if config.iou_head else [])])
    return glus.to(DTYPES[config.precision])


def complete(glus: Glus, target: Target) -> None:
    """Give the last tensors their values, which come from no file but follow from what was loaded."""
    glus.mllm.complete(target.device)
    glus.segmenter.complete()
    empty = [name for name, tensor in (*glus.named_parameters(), *glus.named_buffers()) if tensor.is_meta]
    assert not empty, f"without values: {empty[:5]}"


def quantize(glus: Glus, config: ModelConfig, target: Target) -> Target:
    """Make room for the LLM's projections in fewer bits where that is asked for, before they are loaded.

    Returns:
        Where weights go: these are quantised when they arrive.

    Raises:
        ValueError: they cannot be here, or they are trained.
    """
    quantization = config.llm.quantization
    if quantization is Quantization.none:
        return target
    return replace(target, pack=glus.mllm.quantize(quantization, distributed.device()))


def _split_new_rows(llama: LlamaForCausalLM, config: ModelConfig) -> None:
    """Where ``trainable`` names ``*_new_rows``, make the added tokens' rows of that table parameters of their own.

    Raises:
        ValueError: it names the whole table as well.
    """
    for part, whole, split in _SPLITS:
        if part in config.trainable:
            both = [name for name in (whole, "llm") if name in config.trainable]
            if both:
                raise ValueError(f"model.trainable names {both[0]!r} and {part!r}, which is a part of it: drop one")
            split(llama, sorted(Vocabulary(config.llm.tokenizer).added_tokens.values()))


def build_segmenter(config: SegmenterConfig, memory_gradient: bool = False) -> Sam2Segmenter:
    """SAM2 at random, to be loaded or pre-trained."""
    is_identity = config.fuser_gamma is FuserGamma.identity
    sam = build_sam2(config.variant, config.overrides)
    return Sam2Segmenter(sam, config.multimask_fallback, memory_gradient, is_identity)


def mark_trainable(glus: Glus, parts: list[str]) -> None:
    """Set ``requires_grad`` of every parameter: True where a part of ``parts`` contains it, else False.

    Raises:
        ValueError: a part is unknown, or matches no parameter.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"model.trainable: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    names = dict(glus.named_parameters())
    for part in parts:
        if not any(key in name for name in names for key in PARTS[part]):
            raise ValueError(f"model.trainable: {part!r} matches no parameter (is model.llm.lora_rank 0?)")
    keys = [key for part in parts for key in PARTS[part]]
    for name, parameter in names.items():
        parameter.requires_grad_(any(key in name for key in keys))
    glus.note_trained()


def trainable_names(glus: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in glus.named_parameters() if parameter.requires_grad]
