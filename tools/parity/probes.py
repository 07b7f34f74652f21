"""Intermediate values of the first steps of a pass: where two implementations begin to part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from glus.data.frames import VideoSource
from glus.models.glus import Glus
from glus.models.segmenter.sam2 import DecodedMasks, EncodedMemory
from tools.parity import gates
from tools.parity.arrays import every_nth
from tools.parity.fixture import Arrays
from tools.parity.preprocess import clip_input
from tools.parity.report import Case
from tools.parity.watch import Inner, Step

_SUBSAMPLED = re.compile(r"(.+)_sub(\d+)")
Probe = Callable[[Step, Inner], torch.Tensor]

FIRST: dict[str, Probe] = {
    "sam2_input": lambda _, inner: inner.image_3SS,
    "high_res_256": lambda _, inner: inner.features.high_NChw[0][0],
    "high_res_128": lambda _, inner: inner.features.high_NChw[1][0],
    "image_feature_64": lambda _, inner: inner.features.image_NChw[0],
    "position_64": lambda _, inner: inner.features.position_1Chw[0],
    "dense_position_64": lambda _, inner: inner.dense_position_1Chw[0],
    "memory_position": lambda _, inner: _memory(inner).position_1Chw[0],
}
"""Recorded of the first step; a name may end in ``_subN``: every Nth row and column."""
EACH: dict[str, Probe] = {
    "llm_state": lambda _, inner: inner.state_D,
    "conditioned_64": lambda _, inner: inner.conditioned.image_NChw[0],
    "all_mask_logits": lambda step, _: _decoded(step).all_logits_N4mm[0],
    "all_predicted_iou": lambda step, _: _decoded(step).predicted_iou_N4[0],
    "memory_features": lambda _, inner: _memory(inner).features_NChw[0],
}
"""Recorded of the first steps, as many as the array has entries."""
TOKENS = "visual_tokens"
"""Of the context frames and the first step's frame."""
CLIP_INPUT = "clip_pixel_values"
"""Of the first step's frame."""


def count_probed_steps(probes: Arrays) -> int:
    """Steps whose inner values the probes are of."""
    return max([1, *(len(probes[name]) for name in probes.names if _split(name)[0] in EACH)])


def replay_probes(
    case: Case, probes: Arrays, glus: Glus, video: VideoSource, arrays: Arrays, steps: Sequence[Step]
) -> None:
    """A row for every probe.

    Args:
        case: gets the rows.
        probes: what was recorded.
        glus: the model that made ``steps``.
        video: all frames.
        arrays: of the probed pass; its first frame is the probed one.
        steps: the replay, the first ones with their inner values.
    """
    for name in probes.names:
        with case.errors_as_row(name):
            recorded = probes[name]
            base, nth = _split(name)
            if base == CLIP_INPUT:
                ours = clip_input(glus, video.read(int(arrays["frame_index"][0])))
            elif base == TOKENS:
                ours = _inner(steps, 0).visual_MD.unflatten(0, (-1, glus.mllm.tokens_per_frame)).numpy()
            elif base in FIRST:
                ours = every_nth(FIRST[base](steps[0], _inner(steps, 0)), nth)
            elif base in EACH:
                values = [EACH[base](steps[number], _inner(steps, number)) for number in range(len(recorded))]
                ours = every_nth(torch.stack(values), nth)
            else:
                raise ValueError("recorded, but there is nothing to compare it with")
            case.close(name, ours, recorded, gates.PROBE)
    found = {_split(name)[0] for name in probes.names}
    for name in sorted({*FIRST, *EACH, TOKENS, CLIP_INPUT} - found):
        case.absent(name, f"no such array in {probes.path.name}")


def _split(name: str) -> tuple[str, int]:
    """``x_sub4`` -> (``x``, 4); ``x`` -> (``x``, 1)."""
    match = _SUBSAMPLED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 1)


def _inner(steps: Sequence[Step], number: int) -> Inner:
    inner = steps[number].inner if number < len(steps) else None
    if inner is None:
        raise ValueError(f"the replay has no [SEG] in step {number}, of which this is recorded")
    return inner


def _decoded(step: Step) -> DecodedMasks:
    assert step.decoded is not None, "a step with inner values was answered with [SEG]"
    return step.decoded


def _memory(inner: Inner) -> EncodedMemory:
    if inner.memory is None:
        raise ValueError("the probed pass stores no memory")
    return inner.memory
