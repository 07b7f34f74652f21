"""The predictor at work, step by step: what its model was given and gave, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from glus.data.frames import VideoSource
from glus.inference.predictor import VideoPredictor
from glus.models.segmenter.sam2 import DecodedMasks, EncodedMemory, FrameFeatures
from tools.parity.observe import Call, observed


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
    memory: EncodedMemory | None
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
    """Run the predictor for one sentence over ``order``, frame by frame, and tell what its model did in each step.

    Raises:
        ValueError: ``order`` does not go from a frame up to the last one or down to the first one.
    """
    glus, segmenter = predictor.glus, predictor.glus.segmenter
    inference = replace(predictor.inference, chunk_frames=1)
    stepwise = VideoPredictor(glus, predictor.chat, predictor.frames, inference)
    with observed(
        splice=(glus.mllm, "splice"),
        answer=(glus, "answer"),
        prepare=(segmenter, "prepare_frames"),
        encode=(segmenter, "encode_frames"),
        condition=(segmenter, "condition"),
        position=(segmenter, "dense_position"),
        decode=(segmenter, "decode"),
        memorize=(segmenter, "memorize"),
    ) as calls:
        opening: Call | None = None
        for result in stepwise.segment_pass(video, [text], [order[0]], direction_of(order, len(video))):
            opening = opening or calls["splice"].pop(0)
            yield _step(opening, calls, result.masks_RHW[0])
            for made in calls.values():
                made.clear()


def direction_of(order: Sequence[int], num_frames: int) -> int:
    """1 if ``order`` goes up to the last frame of a video, -1 if it goes down to the first.

    Raises:
        ValueError: it does neither.
    """
    for direction, end in ((1, num_frames), (-1, -1)):
        if list(order) == list(range(order[0], end, direction)):
            return direction
    raise ValueError(f"frames {list(order)}: a pass goes up to frame {num_frames - 1} or down to frame 0")


def _step(opening: Call, calls: dict[str, list[Call]], mask_HW: np.ndarray) -> Step:
    """``opening`` is what the prompts of all steps begin with; each step reads on from there."""
    embeds_1C, logits_1V = _only(calls, "answer").result
    parts = [opening.arguments, _only(calls, "splice").arguments]
    is_segmented = bool(calls["decode"])
    return Step(
        input_ids_L=torch.cat([ids_1L[0] for ids_1L, _, _ in parts]).numpy(),
        next_token=int(logits_1V[0].argmax()),
        embed_C=embeds_1C[0],
        mask_HW=mask_HW,
        num_memories=_num_memories(_only(calls, "condition").arguments[1]) if is_segmented else 0,
        decoded=_only(calls, "decode").result if is_segmented else None,
        inner=_inner(torch.cat([visual_MD for _, _, visual_MD in parts]), calls) if is_segmented else None,
    )


def _inner(visual_MD: torch.Tensor, calls: dict[str, list[Call]]) -> Inner:
    return Inner(
        visual_MD=visual_MD,
        state_D=_only(calls, "answer").arguments[0][0],
        image_3SS=_only(calls, "prepare").result[0],
        features=_only(calls, "encode").result,
        conditioned=_only(calls, "condition").result,
        dense_position_1Chw=_only(calls, "position").result,
        memory=_only(calls, "memorize").result if calls["memorize"] else None,
    )


def _num_memories(memories_1TChw: torch.Tensor | None) -> int:
    return 0 if memories_1TChw is None else memories_1TChw.shape[1]


def _only(calls: dict[str, list[Call]], label: str) -> Call:
    if len(calls[label]) != 1:
        raise ValueError(f"expected one call of {label!r} per frame and sentence, observed {len(calls[label])}")
    return calls[label][0]
