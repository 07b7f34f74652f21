"""From config to network, with no weights but random ones: what is built, and the table of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from glus import distributed
from glus.config import FuserGamma, ModelConfig, Precision, Quantization, SegmenterConfig
from glus.models.glus import Glus, IouHead, SegHead
from glus.models.mllm import Mllm
from glus.models.mllm.adapters import add_lora
from glus.models.mllm.decoder import Decoder
from glus.models.mllm.internvl import build_internvl
from glus.models.mllm.llava import ClipEncoder, Llava, build_llama, build_projector, build_vision_tower
from glus.models.mllm.qwen2_5_vl import build_qwen2_5_vl
from glus.models.mllm.qwen3_vl import build_qwen3_vl
from glus.models.segmenter.sam2 import Sam2Segmenter, build_sam2
from glus.models.weights import Target
from glus.tokens import ADDED_TOKENS, open_vocabulary

_HEADS = {"seg_head": ("seg_head.",), "iou_head": ("iou_head.",)}
_SPLITS: tuple[tuple[str, str, Callable[[Decoder, Sequence[int]], None]], ...] = (
    ("embeddings_new_rows", "embeddings", Decoder.split_embeddings),
    ("lm_head_new_rows", "lm_head", Decoder.split_head),
)
"""Part of some rows, part of the whole table, and what sets the rows apart."""

RANDOM_STD = 0.02
"""LLaMA's own, of weights that are to be measured with."""
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def _no_connector(config: ModelConfig) -> None:
    """What ties tower and LLM together comes with the rest."""


def _llava_connector(config: ModelConfig) -> nn.Module:
    return build_projector(config.clip.architecture["hidden_size"], config.llm.architecture["hidden_size"])


def _llava(config: ModelConfig, connector: Any, is_tower_empty: bool, is_llm_empty: bool) -> Mllm:
    clip, llm = config.clip, config.llm
    if llm.tied:
        raise ValueError("model.llm.tied=true: LLaVA's head is a table of its own")
    with torch.device("meta") if is_tower_empty else nullcontext():
        tower = build_vision_tower(clip.architecture)
    with torch.device("meta") if is_llm_empty else nullcontext():
        llama = build_llama(llm.architecture, llm.vocab_size)
    return Llava(ClipEncoder(tower, clip.select_layer, clip.pool), connector, llama)


def _whole(
    build: Callable[..., Mllm], config: ModelConfig, connector: None, is_tower_empty: bool, is_llm_empty: bool
) -> Mllm:
    """A family that comes in one folder, and is empty as a whole where its LLM is."""
    vision, llm = config.vision, config.llm
    sides = (vision.context_size, vision.query_size)
    with torch.device("meta") if is_llm_empty else nullcontext():
        return build(vision.architecture, llm.architecture, llm.vocab_size, llm.tied, sides)


def _internvl(config: ModelConfig, *others: Any) -> Mllm:
    return _whole(partial(build_internvl, pool=config.vision.pool), config, *others)


FAMILIES: Mapping[str, tuple[Callable[[ModelConfig], Any], Callable[..., Mllm]]] = {
    "llava": (_llava_connector, _llava),
    "internvl": (_no_connector, _internvl),
    "qwen3_vl": (_no_connector, partial(_whole, build_qwen3_vl)),
    "qwen2_5_vl": (_no_connector, partial(_whole, build_qwen2_5_vl)),
}
"""``model.family`` -> what draws the small part between tower and LLM, if it is a part of its own, and what builds the
MLLM around it; is_tower_empty, is_llm_empty: see ``assemble``."""
OF_ANY_SIZE = ("qwen3_vl", "qwen2_5_vl")
"""Families whose tower runs once for each size that frames have: not equally often on all ranks, as ZeRO-3, which
gathers its parameters each time, must have it."""


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
    complete(glus)
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
    llm = config.llm
    if config.family not in FAMILIES:
        raise ValueError(f"model.family={config.family!r}: known are {', '.join(FAMILIES)}")
    draw_connector, build_mllm = FAMILIES[config.family]
    # What is small and drawn at random comes first: so it is the same whether the large parts are drawn or loaded.
    segmenter = build_segmenter(config.segmenter, memory_gradient=not config.memory.detach)
    connector = draw_connector(config)
    seg_head = SegHead(llm.architecture["hidden_size"], segmenter.width * config.seg_prompts, config.seg_head_gain)
    glus = Glus(
        mllm=build_mllm(config, connector, is_clip_empty, is_llm_empty),
        seg_head=seg_head,
        segmenter=segmenter,
        seg_state=config.seg_state,
        memory_frames=config.memory.num_frames,
        memory_stride=config.memory.stride,
        memory_enabled=config.memory.enabled,
    )
    if config.iou_head:
        with torch.random.fork_rng(devices=[]):  # so that all else starts as it would without
            glus.iou_head = IouHead(glus.mllm.width, glus.segmenter.width)
    decoder = glus.mllm.decoder
    if llm.lora_rank:
        add_lora(decoder.text, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, llm.lora_targets)
    _split_new_rows(decoder, config)
    mark_trainable(glus, [*config.trainable, *(["iou_head"] if config.iou_head else [])])
    return glus.to(DTYPES[config.precision])


def complete(glus: Glus) -> None:
    """Give the last tensors their values, which come from no file but follow from what was loaded."""
    glus.mllm.decoder.complete()
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
    return replace(target, pack=glus.mllm.decoder.quantize(quantization, distributed.device()))


def _split_new_rows(decoder: Decoder, config: ModelConfig) -> None:
    """Where ``trainable`` names ``*_new_rows``, make the added tokens' rows of that table parameters of their own.

    Raises:
        ValueError: it names the whole table as well.
    """
    for part, whole, split in _SPLITS:
        if part in config.trainable:
            both = [name for name in (whole, "llm") if name in config.trainable]
            if both:
                raise ValueError(f"model.trainable names {both[0]!r} and {part!r}, which is a part of it: drop one")
            split(decoder, _added_rows(config))


def _added_rows(config: ModelConfig) -> list[int]:
    """The added tokens'; of a plan, where nothing has values, the last ones, so that it needs no vocabulary."""
    if torch.empty(0).device.type == "meta":
        count = len(ADDED_TOKENS) if config.family == "llava" else 1
        return list(range(config.llm.vocab_size - count, config.llm.vocab_size))
    return sorted(open_vocabulary(config.llm.tokenizer).added_tokens.values())


def build_segmenter(config: SegmenterConfig, memory_gradient: bool = False) -> Sam2Segmenter:
    """SAM2 at random, to be loaded or pre-trained."""
    is_identity = config.fuser_gamma is FuserGamma.identity
    sam = build_sam2(config.variant, config.overrides)
    return Sam2Segmenter(sam, config.multimask_fallback, memory_gradient, is_identity)


def parts_of(glus: Glus) -> dict[str, tuple[str, ...]]:
    """What ``model.trainable`` may name: part -> substrings of the parameter names it stands for."""
    return {**glus.mllm.PARTS, **_HEADS, **glus.segmenter.PARTS}


def mark_trainable(glus: Glus, parts: list[str]) -> None:
    """Set ``requires_grad`` of every parameter: True where a part of ``parts`` contains it, else False.

    Raises:
        ValueError: a part is unknown, or matches no parameter.
    """
    known = parts_of(glus)
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise ValueError(f"model.trainable: unknown part {unknown[0]!r}; known are {', '.join(known)}")
    names = dict(glus.named_parameters())
    for part in parts:
        if not any(key in name for name in names for key in known[part]):
            raise ValueError(
                f"model.trainable: {part!r} matches no parameter (is model.llm.lora_rank 0, or the head tied?)"
            )
    keys = [key for part in parts for key in known[part]]
    for name, parameter in names.items():
        parameter.requires_grad_(any(key in name for key in keys))
    glus.segmenter.note_trained()


def trainable_names(glus: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in glus.named_parameters() if parameter.requires_grad]
