"""The training forward pass as one writes it first, to compare ours with: same weights, same result, nothing shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from glus.batch import Batch, GlusOutput, TokenRows, TrainSample
from glus.data.chat.tree import separate_rows, unpack_conversations
from glus.data.loader import collate
from glus.models.glus import Glus, segment_step


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device, in the form of either procedure."""

    batch: Batch
    frames: list[torch.Tensor]
    """B tensors (K + Q, H, W, 3) uint8 on the CPU."""
    rows: TokenRows
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
    pixels_BF3ss = torch.cat([batch.context_pixels, batch.query_pixels], dim=1)
    visual = [glus.mllm.see(pixels_BF3ss[video]).flatten(0, 1) for video in batch.video_index.tolist()]
    ids_NL = inputs.rows.input_ids_BL
    everywhere = torch.arange(ids_NL.numel(), device=ids_NL.device)
    states_RD, _ = glus.mllm.states(replace(inputs.rows, reads_R=everywhere), torch.cat(visual))
    logits_RV, reads_NQ = glus.mllm.logits(states_RD), inputs.rows.reads_R.unflatten(0, (len(ids_NL), -1))
    embeds_NQC = glus.seg_head(states_RD[reads_NQ])
    masks = [
        _released_masks(glus, frames, embeds_NQC[batch.video_index == video])
        for video, frames in enumerate(inputs.frames)
    ]
    return GlusOutput(logits_RV[reads_NQ], embeds_NQC, torch.cat(masks))


def _released_masks(glus: Glus, frames_FHWC: torch.Tensor, embeds_EQC: torch.Tensor) -> torch.Tensor:
    """Mask logits (E, Q, m, m) of the last Q frames of a video."""
    num_rows, num_query = embeds_EQC.shape[:2]
    images = torch.cat([glus.segmenter.prepare_frames(frame[None]) for frame in frames_FHWC]).to(embeds_EQC.device)
    bank, masks = glus.memory_bank(), []
    for q in range(num_query):
        frame = glus.segmenter.encode_frames(images[q - num_query, None]).rows([0] * num_rows)
        masks.append(segment_step(glus.segmenter, bank, dict.fromkeys(range(num_rows), q), frame, embeds_EQC[:, q]))
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
    separate = sum(len(conversation.input_ids) for conversation in unpack_conversations(batch.rows))
    return {"plain": separate, "ours": batch.rows.paths_NC.unique().numel()}


def _inputs(samples: Sequence[TrainSample], frames: Sequence[np.ndarray], pad_id: int, device: str) -> Inputs:
    batch = collate(samples, pad_id)
    rows = separate_rows(unpack_conversations(batch.rows), pad_id)
    return Inputs(batch.to(device), [torch.from_numpy(video) for video in frames], rows.to(device))


def _only(sample: TrainSample, row: int) -> TrainSample:
    """The sample with one of its expressions."""
    return replace(
        sample,
        conversations=[sample.conversations[row]],
        target_masks=[sample.target_masks[row]],
        object_keys=[sample.object_keys[row]],
        names=[sample.names[row]],
    )
