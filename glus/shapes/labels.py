"""What scenes say about patches and sentences, and the heads that read it off features and states.

The heads are thrown away after pre-training. GLUS starts from LISA, whose LLM reads and grounds already; learning both
through a mask decoder's gradient alone takes an LLM that starts from nothing very long: with all kinds of sentences it
had not left "the mean of all objects" after 780 steps, while these labels, read off its state by a linear head, give
words in 100 steps and places (to one patch, on 8 out of 10 frames) in 900 (measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from glus.shapes.render import COLOURS, SHAPES
from glus.shapes.scene import Scene, Sentence

SHAPE_LABELS, COLOUR_LABELS = (None, *SHAPES), (None, *COLOURS)
"""Their indices are the labels; 0 stands for background, or for what is not named."""
PLACE_WAVES = np.array([1.0, 2.0, 3.0, 4.0])
"""Half waves across the frame, in which patches tell where their object's centre is."""
MIN_COVER = 0.15
"""Share of a patch that its object must cover, else the patch is background."""
BACKGROUND_WEIGHT = 0.2
"""Of background patches in the cross-entropies; four out of five patches are background."""
PLACE_WEIGHT = 5.0
"""Of the mean absolute error of places, whose entries lie in [-1, 1], beside the two cross-entropies."""
WORDS = (*SHAPES, *COLOURS)
PLACE_CELLS = 8
"""Cells across the frame whose share of the target is learned, for x and for y."""
MAX_COUNT = 2
"""Visible targets are counted up to this."""


class PatchLabels(NamedTuple):
    """What lies in each of the G*G patches of frames: the object that covers most of it."""

    shape: torch.Tensor
    """(F, G*G) int64, index into ``SHAPE_LABELS``."""
    colour: torch.Tensor
    """(F, G*G) int64, index into ``COLOUR_LABELS``."""
    place: torch.Tensor
    """(F, G*G, 4 * len(PLACE_WAVES)) float32 in [-1, 1]: sine and cosine of the object centre's x and y at a few
    frequencies; 0 on background."""


def patch_labels(frames: Sequence[tuple[Scene, int]], grid: int) -> PatchLabels:
    """Labels of some frames on a ``grid`` x ``grid`` raster.

    Args:
        frames: scenes, and which frame of each; square, with a side that is a multiple of ``grid``.
        grid: patches per row.
    """
    return PatchLabels(*stack([_label_frame(scene, t, grid) for scene, t in frames]))


def stack(rows: Sequence[tuple[object, ...]]) -> list[torch.Tensor]:
    """Rows of equal parts -> each part of all rows as one tensor."""
    return [torch.as_tensor(np.stack(part)) for part in zip(*rows, strict=True)]  # type: ignore[arg-type]


def _label_frame(scene: Scene, frame: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    masks = scene.masks_OTHW[:, frame]
    side = masks.shape[-1]
    cover = masks.reshape(len(masks), grid, side // grid, grid, side // grid).mean((2, 4)).reshape(len(masks), -1)
    owner = cover.argmax(0)
    is_object = cover.max(0) >= MIN_COVER
    shapes = np.array([SHAPE_LABELS.index(item.shape) for item in scene.objects])
    colours = np.array([COLOUR_LABELS.index(item.colour_T[frame]) for item in scene.objects])
    centres = np.stack([item.path_T2[frame] for item in scene.objects]) / side
    angles = (np.pi * centres[:, :, None] * PLACE_WAVES).reshape(len(centres), -1)
    places = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return is_object * shapes[owner], is_object * colours[owner], is_object[:, None] * places[owner]


class PatchHead(nn.Module):
    """Reads the labels of all patches off image features.

    Args:
        width: of a feature.
        pool: patches that share a feature.
    """

    def __init__(self, width: int, pool: int):
        super().__init__()
        self.sizes = (len(SHAPE_LABELS), len(COLOUR_LABELS), 4 * len(PLACE_WAVES))
        self.pool = pool
        self.linear = nn.Linear(width, pool * sum(self.sizes))

    def forward(self, features_FPC: torch.Tensor, labels: PatchLabels) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of reading ``labels`` off the features (F, P, width), and how well that went on objects."""
        read = self.linear(features_FPC).unflatten(-1, (self.pool, -1)).flatten(1, 2)
        shape, colour, place = read.split(self.sizes, dim=-1)
        is_object = labels.shape > 0
        place_error = (place - labels.place)[is_object].abs().mean()
        loss = _cross_entropy(shape, labels.shape) + _cross_entropy(colour, labels.colour) + PLACE_WEIGHT * place_error
        return loss, {
            "place": float(place_error.detach()),
            "shape": float((shape.argmax(-1) == labels.shape)[is_object].float().mean()),
            "colour": float((colour.argmax(-1) == labels.colour)[is_object].float().mean()),
        }


def _cross_entropy(logits_FPL: torch.Tensor, labels_FP: torch.Tensor) -> torch.Tensor:
    weights = torch.ones(logits_FPL.shape[-1])
    weights[0] = BACKGROUND_WEIGHT
    return F.cross_entropy(logits_FPL.flatten(0, 1), labels_FP.flatten(), weights)


class SentenceLabels(NamedTuple):
    """What R sentences say and mean in one frame each."""

    named: torch.Tensor
    """(R, len(WORDS)) float32: 1 for each word of ``WORDS`` in the sentence."""
    num_visible: torch.Tensor
    """(R,) int64: targets in sight."""
    columns: torch.Tensor
    """(R, PLACE_CELLS) float32: share of the targets in each column of cells; 0 where none is in sight."""
    rows: torch.Tensor
    """The same of each row of cells."""


def sentence_labels(rows: Sequence[tuple[Sentence, Scene, int]]) -> SentenceLabels:
    """Labels of sentences about a frame of their scene."""
    return SentenceLabels(*stack([_label_sentence(*row) for row in rows]))


def _label_sentence(sentence: Sentence, scene: Scene, frame: int) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    said = [word.removesuffix("s") for word in sentence.text.split()]
    masks = scene.masks_OTHW[list(sentence.object_ids), frame]
    side = masks.shape[-1] // PLACE_CELLS
    area = masks.any(0).reshape(PLACE_CELLS, side, PLACE_CELLS, side).sum((1, 3)).astype(np.float32)
    area /= max(1.0, float(area.sum()))
    named = np.array([word in said for word in WORDS], np.float32)
    return named, min(MAX_COUNT, int(masks.any((1, 2)).sum())), area.sum(0), area.sum(1)


class SentenceHead(nn.Module):
    """Reads the labels of sentences off [SEG] states."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (len(WORDS), 1 + MAX_COUNT, PLACE_CELLS, PLACE_CELLS)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, states_RD: torch.Tensor, labels: SentenceLabels) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of reading the labels off the states, and how well that went."""
        words, count, x, y = self.linear(states_RD).split(self.sizes, dim=-1)
        seen = labels.num_visible > 0
        loss = F.binary_cross_entropy_with_logits(words, labels.named, reduction="none").sum(1).mean()
        loss = loss + F.cross_entropy(count, labels.num_visible)
        # Shares are all 0, and so is their cross-entropy, where no target is seen.
        place = F.cross_entropy(x, labels.columns, reduction="sum") + F.cross_entropy(y, labels.rows, reduction="sum")
        loss = loss + place / seen.sum().clamp(min=1)
        hits = {
            "words": ((words > 0) == (labels.named > 0.5)).all(1),
            "count": count.argmax(-1) == labels.num_visible,
            "place": (_near(x, labels.columns) & _near(y, labels.rows))[seen],
        }
        return loss, {name: float(hit.float().mean()) for name, hit in hits.items() if len(hit)}


def _near(logits_RP: torch.Tensor, shares_RP: torch.Tensor) -> torch.Tensor:
    """Whether the most likely cell lies within one of the cell with most of the target."""
    return (logits_RP.argmax(-1) - shares_RP.argmax(-1)).abs() <= 1


class WordPrompts(nn.Module):
    """SAM2's prompts in words, "red", "circle", "red circle": a learned embedding per word.

    They make SAM2's features tell colours and shapes apart, as real features do, and its decoder find them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.shape = nn.Embedding(len(SHAPE_LABELS), width, padding_idx=0)
        self.colour = nn.Embedding(len(COLOUR_LABELS), width, padding_idx=0)

    def forward(self, words_R2: torch.Tensor) -> torch.Tensor:
        """(R, 2) labels of shape and colour, 0 where not named -> (R, C)."""
        return self.shape(words_R2[:, 0]) + self.colour(words_R2[:, 1])
