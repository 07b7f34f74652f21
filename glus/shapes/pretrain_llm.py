"""LLM and projector: answer with [SEG], and say, from the state before it, what a sentence names and where that is.

GLUS starts from LISA, whose LLM reads and grounds already. Learning both through a mask decoder's gradient alone takes
an LLM that starts from nothing very long: with all kinds of sentences it had not left "the mean of all objects" after
780 steps, while these labels, read off its state by a linear head that is thrown away, give words in 100 steps and
places (to one patch, on 8 out of 10 frames) in 900 (measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from glus.batch import Conversation
from glus.config import FramesConfig
from glus.data import sampling
from glus.data.chat.llava import LlavaChat
from glus.data.chat.wording import draw_turns
from glus.data.loader import pad_conversations
from glus.distributed import generator
from glus.losses.terms import seg_cross_entropy
from glus.models.glus import Glus
from glus.models.mllm.llava import ClipEncoder, clip_crop
from glus.shapes.pretrain_labels import SCENE_STREAM
from glus.shapes.pretrain_optimize import Report, TowerOptimizer
from glus.shapes.render import COLOURS, SHAPES
from glus.shapes.scene import Scene, Sentence

SENTENCES_PER_SCENE = 3
SINGLE_FRAME_SHARE = 0.6
"""Of the steps, on one frame without context, which is a fifth as long: words and places are learned there."""
WORDS = (*SHAPES, *COLOURS)
PLACE_CELLS = 8
"""Cells across the frame whose share of the target is told, for x and for y."""
ANSWER_WEIGHT = 0.1
"""Of the [SEG] cross-entropy. Learned only in GLUS's training, at weight 1, it shrinks every state onto the one
direction that predicts [SEG] before masks have taught anything (embeddings' spread halved in 60 steps, measured)."""
MAX_COUNT = 2
"""Visible targets are counted up to this."""


class SentenceHead(nn.Module):
    """Linear readings of [SEG] states: words named, targets in sight, and where they are."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(WORDS), 1 + MAX_COUNT, PLACE_CELLS, PLACE_CELLS)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(
        self, states_RD: torch.Tensor, labels: Sequence[SentenceLabels]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of reading the labels off the states, and how well that went."""
        words, count, x, y = self.linear(states_RD).split(self.sizes, dim=-1)
        named = torch.tensor(np.stack([label.named for label in labels]))
        counts = torch.tensor([label.count for label in labels])
        seen = counts > 0
        columns = torch.tensor(np.stack([label.columns for label in labels]))
        rows = torch.tensor(np.stack([label.rows for label in labels]))
        loss = F.binary_cross_entropy_with_logits(words, named, reduction="none").sum(1).mean()
        loss = loss + F.cross_entropy(count, counts)
        # Shares are all 0, and so is their cross-entropy, where no target is seen.
        place = F.cross_entropy(x, columns, reduction="sum") + F.cross_entropy(y, rows, reduction="sum")
        loss = loss + place / seen.sum().clamp(min=1)
        found = (_near(x, columns) & _near(y, rows))[seen]
        values = {"words": ((words > 0) == (named > 0.5)).all(1), "count": count.argmax(-1) == counts, "place": found}
        return loss, {name: float(hit.float().mean()) for name, hit in values.items() if len(hit)}


class SentenceLabels:
    """What a sentence says and means in one frame.

    Args:
        sentence: about ``scene``.
        scene: its masks tell where the targets are.
        frame: index.
    """

    def __init__(self, sentence: Sentence, scene: Scene, frame: int):
        said = [word.removesuffix("s") for word in sentence.text.split()]
        self.named = np.array([word in said for word in WORDS], np.float32)
        """(len(WORDS),) 1 for each word of ``WORDS`` in the sentence."""
        masks = scene.masks_OTHW[list(sentence.object_ids), frame]
        self.count = min(MAX_COUNT, int(masks.any((1, 2)).sum()))
        """Targets in sight."""
        side = masks.shape[-1] // PLACE_CELLS
        area = masks.any(0).reshape(PLACE_CELLS, side, PLACE_CELLS, side).sum((1, 3)).astype(np.float32)
        area /= max(1.0, float(area.sum()))
        self.columns, self.rows = area.sum(0), area.sum(1)
        """Share of the targets in each column and row of cells."""


@dataclass(frozen=True)
class _Row:
    """A conversation about a scene."""

    conversation: Conversation
    features_FPC: torch.Tensor
    """CLIP features of its context and query frames."""
    labels: list[SentenceLabels]
    """One per query frame."""


def _draw_rows(
    rng: np.random.Generator,
    scene: Scene,
    features_TPC: torch.Tensor,
    frames: FramesConfig,
    tokenizer: LlavaChat,
) -> list[_Row]:
    """Conversations of one scene about the same frames."""
    length = len(scene.frames_THW3)
    query = sampling.query_indices_train(length, frames.num_query, frames.query_sampling, rng)
    context = sampling.context_indices_train(length, frames.num_context, rng)
    rows = []
    for chosen in rng.choice(len(scene.sentences), SENTENCES_PER_SCENE, replace=False):
        sentence = scene.sentences[chosen]
        turns = draw_turns(sentence.text, frames.num_query, rng)
        conversation = tokenizer.train(turns, frames.num_context, sentence.text)
        labels = [SentenceLabels(sentence, scene, t) for t in query]
        rows.append(_Row(conversation, features_TPC[[*context, *query]], labels))
    return rows


def pretrain_llm(
    glus: Glus,
    tokenizer: LlavaChat,
    frames: FramesConfig,
    scenes: Sequence[Scene],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> None:
    """Train LLM and projector on conversations about scenes; nothing else of ``glus`` is used but its frozen CLIP.

    Args:
        glus: its CLIP is pre-trained.
        tokenizer: the model's own.
        frames: K, Q and sampling of the second part; the first has one frame and no context.
        scenes: where conversations come from.
        steps: optimizer steps.
        batch_size: videos per step on single frames, each with ``SENTENCES_PER_SCENE`` rows; whole conversations are
            drawn in half that number.
        learning_rate: peak.
        seed: decides frames and sentences.
        report: gets the loss and the accuracies of words, count and place of every step.
    """
    features = [encode_scene(glus.mllm.clip, scene) for scene in scenes]
    head = SentenceHead(glus.mllm.width)
    glus.train()
    trained = [llava.projector, llava.llama]
    for module in trained:
        module.requires_grad_(True)
    optimizer = TowerOptimizer([*trained, head], learning_rate, steps)
    single = FramesConfig(num_context=0, num_query=1)
    for step in range(steps):
        is_single = step < SINGLE_FRAME_SHARE * steps
        want, videos = (single, batch_size) if is_single else (frames, max(1, batch_size // 2))
        rng = generator(seed, SCENE_STREAM, 3, step)
        rows = [
            row
            for number in rng.integers(len(scenes), size=videos)
            for row in _draw_rows(rng, scenes[number], features[number], want, tokenizer)
        ]
        conversations, visual = [row.conversation for row in rows], [row.features_FPC for row in rows]
        labels = [label for row in rows for label in row.labels]
        ids_NL, placeholders_M, positions_NQ = pad_conversations(conversations, tokenizer.vocabulary.pad_id)
        visual_MD = glus.mllm.projector(torch.stack(visual)).flatten(0, 2)
        states_NLD = glus.mllm.states(ids_NL, placeholders_M, visual_MD)
        states_RD = torch.cat([states[positions] for states, positions in zip(states_NLD, positions_NQ, strict=True)])
        loss, values = head(states_RD, labels)
        answer = seg_cross_entropy(glus.mllm.logits(states_RD), tokenizer.vocabulary.seg_id).mean()
        optimizer.update(loss + ANSWER_WEIGHT * answer)
        report(step, {"loss": float(loss.detach()), **values})
    glus.eval()


@torch.no_grad()
def encode_scene(clip: ClipEncoder, scene: Scene) -> torch.Tensor:
    """CLIP features of all frames: (T, P, width)."""
    crops = np.stack([clip_crop(frame, clip.image_size) for frame in scene.frames_THW3])
    return clip(torch.as_tensor(crops).permute(0, 3, 1, 2))


def _near(logits_RP: torch.Tensor, shares_RP: torch.Tensor) -> torch.Tensor:
    """Whether the most likely cell lies within one of the cell with most of the target."""
    return (logits_RP.argmax(-1) - shares_RP.argmax(-1)).abs() <= 1
