"""The predictor at work, step by step: what its model was given and gave, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glus.data.frames import VideoSource
from glus.inference.predictor import VideoPredictor
from glus.models.memory import FrameMemory
from glus.models.sam2 import DecodedMasks, FrameFeatures
from glus.parity.observe import Call, observed


@dataclass(frozen=True)
class Inner:
    """The intermediate values of a step, too large to keep for a whole video."""

    visual_MD: torch.Tensor
    """Tokens of the context frames and the window."""
    state_D: torch.Tensor
    """The LLM's final state where [SEG] was to be predicted."""
    image_3SS: torch.Tensor
    features: FrameFeatures
    conditioned: FrameFeatures
    dense_position_1Chw: torch.Tensor
    memory: FrameMemory | None
    """None where memory is off."""


@dataclass(frozen=True)
class Step:
    """What the live model did for one sentence in one frame."""

    input_ids_L: np.ndarray
    next_token: int
    embed_C: torch.Tensor
    mask_HW: np.ndarray
    num_memories: int
    """Memories read; 0 without [SEG]."""
    decoded: DecodedMasks | None
    """None where [SEG] was not the most likely token."""
    inner: Inner | None
    """None likewise, and where it was not kept."""


def watch(predictor: VideoPredictor, video: VideoSource, text: str, order: Sequence[int]) -> Iterator[Step]:
    """Run the predictor for one sentence over ``order`` and tell what its model did in each step."""
    glus, segmenter = predictor.glus, predictor.glus.segmenter
    with observed(
        ask=(glus, "seg_embeddings"),
        states=(glus.language, "states"),
        prepare=(segmenter, "prepare_frames"),
        encode=(segmenter, "encode_frames"),
        condition=(segmenter, "condition"),
        position=(segmenter, "dense_position"),
        decode=(segmenter, "decode"),
        memorize=(segmenter, "memorize"),
    ) as calls:
        for result in predictor.segment(video, [text], order):
            yield _step(calls, result.masks_RHW[0])
            for made in calls.values():
                made.clear()


def _step(calls: dict[str, list[Call]], mask_HW: np.ndarray) -> Step:
    ask = _only(calls, "ask")
    ids_1L, mask_1L = ask.arguments[:2]
    embeds_1QC, logits_1QV = ask.result
    is_segmented = bool(calls["decode"])
    return Step(
        input_ids_L=ids_1L[0][mask_1L[0]].numpy(),
        next_token=int(logits_1QV[0, -1].argmax()),
        embed_C=embeds_1QC[0, -1],
        mask_HW=mask_HW,
        num_memories=len(_only(calls, "condition").arguments[1]) if is_segmented else 0,
        decoded=_only(calls, "decode").result if is_segmented else None,
        inner=_inner(calls) if is_segmented else None,
    )


def _inner(calls: dict[str, list[Call]]) -> Inner:
    _, _, visual_MD, positions_1Q = _only(calls, "ask").arguments
    return Inner(
        visual_MD=visual_MD,
        state_D=_only(calls, "states").result[0, positions_1Q[0, -1]],
        image_3SS=_only(calls, "prepare").result[0],
        features=_only(calls, "encode").result,
        conditioned=_only(calls, "condition").result,
        dense_position_1Chw=_only(calls, "position").result,
        memory=_only(calls, "memorize").result if calls["memorize"] else None,
    )


def _only(calls: dict[str, list[Call]], label: str) -> Call:
    if len(calls[label]) != 1:
        raise ValueError(f"expected one call of {label!r} per frame and sentence, observed {len(calls[label])}")
    return calls[label][0]
