"""The training forward pass as one writes it first, to compare ours with: same weights, same result, nothing shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from glus.batch import Batch, GlusOutput, TrainSample
from glus.data.chat.tree import unpack_conversations
from glus.data.loader import collate, pad_conversations
from glus.models.glus import Glus, segment_step


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device, in the form of either procedure."""

    batch: Batch
    frames: list[torch.Tensor]
    """B tensors (K + Q, H, W, 3) uint8 on the CPU."""
    ids_NL: torch.Tensor
    placeholders_M: torch.Tensor
    positions_NQ: torch.Tensor
    """Conversations in rows of their own."""
    alone: Sequence[Inputs] = ()
    """The same for each expression alone."""


Forward = Callable[[Glus, Inputs], GlusOutput]


def shared_forward(glus: Glus, inputs: Inputs) -> GlusOutput:
    """What training runs."""
    output: GlusOutput = glus(inputs.batch)
    return output


def plain_forward(glus: Glus, inputs: Inputs) -> GlusOutput:
    """The same result, one expression after the other."""
    outputs = [released_forward(glus, alone) for alone in inputs.alone]
    seg_logits, seg_embeds, mask_logits, _ = zip(*outputs, strict=True)
    return GlusOutput(torch.cat(seg_logits), torch.cat(seg_embeds), torch.cat(mask_logits))


def released_forward(glus: Glus, inputs: Inputs) -> GlusOutput:
    """The same result as the released GLUS computes it: SAM2's features of a query frame are shared, no more."""
    batch = inputs.batch
    crops_BFCss = torch.cat([batch.context_pixels, batch.query_pixels], dim=1)
    tokens = [glus.vision_tokens(crops_BFCss[[video]]) for video in batch.video_index.tolist()]
    states_NLD = glus.mllm.states(inputs.ids_NL, inputs.placeholders_M, torch.cat(tokens).flatten(0, 2))
    logits_NLV = glus.mllm.logits(states_NLD)
    row_N1 = torch.arange(len(states_NLD), device=states_NLD.device)[:, None]
    embeds_NQC = glus.seg_head(states_NLD[row_N1, inputs.positions_NQ])
    masks = [
        _released_masks(glus, frames, embeds_NQC[batch.video_index == video])
        for video, frames in enumerate(inputs.frames)
    ]
    return GlusOutput(logits_NLV[row_N1, inputs.positions_NQ], embeds_NQC, torch.cat(masks))


def _released_masks(glus: Glus, frames_FHWC: torch.Tensor, embeds_EQC: torch.Tensor) -> torch.Tensor:
    """Mask logits (E, Q, m, m) of the last Q frames of a video."""
    num_rows, num_query = embeds_EQC.shape[:2]
    images = torch.cat([glus.segmenter.prepare_frames(frame[None]) for frame in frames_FHWC]).to(embeds_EQC.device)
    bank, masks = glus.memory_bank(), []
    for q in range(num_query):
        frame = glus.segmenter.encode_frames(images[q - num_query, None]).rows([0] * num_rows)
        decoded = segment_step(glus.segmenter, bank, dict.fromkeys(range(num_rows), q), frame, embeds_EQC[:, q])
        masks.append(decoded.logits_Nmm)
    return torch.stack(masks, dim=1)


def make_inputs(samples: Sequence[TrainSample], frames: Sequence[np.ndarray], pad_id: int, device: str) -> Inputs:
    """A micro-batch in the form of each procedure.

    Args:
        samples: B videos.
        frames: (K + Q, H, W, 3) uint8 of each, context frames first.
        pad_id: token on padding.
        device: where the model is.
    """
    alone = [
        _inputs([_only(sample, row)], [video], pad_id, device)
        for sample, video in zip(samples, frames, strict=True)
        for row in range(len(sample.names))
    ]
    return replace(_inputs(samples, frames, pad_id, device), alone=alone)


def count_tokens(batch: Batch) -> dict[str, int]:
    """Tokens that the LLM sees of a batch in either procedure, padding not counted."""
    separate = sum(len(conversation.input_ids) for conversation in unpack_conversations(batch))
    return {"plain": separate, "ours": batch.conversation_tokens.unique().numel()}


def _inputs(samples: Sequence[TrainSample], frames: Sequence[np.ndarray], pad_id: int, device: str) -> Inputs:
    batch = collate(samples, pad_id)
    ids, where, positions = pad_conversations(unpack_conversations(batch), pad_id)
    pixels = [torch.from_numpy(video) for video in frames]
    return Inputs(batch.to(device), pixels, ids.to(device), where.to(device), positions.to(device))


def _only(sample: TrainSample, row: int) -> TrainSample:
    """The sample with one of its expressions."""
    return replace(
        sample,
        conversations=[sample.conversations[row]],
        target_masks=[sample.target_masks[row]],
        object_keys=[sample.object_keys[row]],
        names=[sample.names[row]],
    )
