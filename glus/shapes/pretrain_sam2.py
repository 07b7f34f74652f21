"""SAM2: prompt -> mask in the first frame, memory -> mask in later ones, as SAM2 itself learned.

Prompts are places (the mean click of a target) or words ("red", "circle"): an LLM that starts from little can then tell
the decoder what to look for long before it can tell where. Words of a word-prompted target need no click, which makes
the features tell colours and shapes apart, as real features do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from glus.distributed import generator
from glus.losses.terms import binary_cross_entropy, dice_loss
from glus.models.glus import segment_step
from glus.models.segmenter.memory import MemoryBank
from glus.models.segmenter.sam2 import Sam2Segmenter, upsample_masks
from glus.shapes.pretrain_labels import SCENE_STREAM, PatchHead, patch_labels
from glus.shapes.pretrain_optimize import Report, TowerOptimizer
from glus.shapes.render import COLOURS, SHAPES
from glus.shapes.scene import Scene

ROWS_PER_VIDEO = 4
"""Targets drawn in each clip, half by place and half by words; the image encoder runs once for all of them."""
PROMPT_NOISE = 0.05
"""Standard deviation of the noise on prompts, whose own entries are about 0.7: the LLM's will not be perfect."""
LABEL_WEIGHT = 0.3
"""Of the patch labels, read off the image features. With them words reach IoU 0.75 by step 1000 instead of 0.60, and
prompts by place are followed by step 1100 instead of not at all (measured; 64 and 128 pixels)."""
SINGLE_FRAME_SHARE = 0.7
"""Of the steps, on single frames: prompts are learned before memory, which takes 250 steps of clips (measured)."""


def pretrain_sam2(
    segmenter: Sam2Segmenter,
    scenes: Sequence[Scene],
    steps: int,
    batch_size: int,
    num_frames: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> None:
    """Train SAM2 end to end: prompts by place or by words for one object, several, or none; in later
    frames half of them are left out.

    Args:
        segmenter: all of it is trained, with gradients through the memory.
        scenes: where clips come from.
        steps: optimizer steps.
        batch_size: clips per step, each with ``ROWS_PER_VIDEO`` targets.
        num_frames: consecutive frames per clip.
        learning_rate: peak.
        seed: decides clips and prompts.
        report: gets the loss and the IoU by place, by words and in later frames of every step.
    """
    words, head = WordPrompts(segmenter.width), PatchHead(segmenter.width, pool=1)
    segmenter.train().requires_grad_(True)
    segmenter.note_trained()
    segmenter.memory_gradient = True
    optimizer = TowerOptimizer([segmenter, words, head], learning_rate, steps)
    for step in range(steps):
        length = 1 if step < SINGLE_FRAME_SHARE * steps else num_frames
        clip = _draw_clip(generator(seed, SCENE_STREAM, 2, step), scenes, batch_size, length)
        features = segmenter.encode_frames(segmenter.prepare_frames(clip.frames_FHWC))
        image_FPC = features.image_NChw.flatten(2).transpose(1, 2)
        label_loss, _ = head(image_FPC, patch_labels(clip.frame_names, features.image_NChw.shape[-1]))
        bank = MemoryBank(num_frames=7, stride=1)
        losses, ious = [], []
        for t in range(length):
            frame = features.rows(clip.video_R * length + t)
            prompts = _prompts(segmenter, words, clip, t)
            logits = segment_step(segmenter, bank, dict.fromkeys(range(len(prompts)), t), frame, prompts)
            target = clip.targets_RTHW[:, t]
            logits = upsample_masks(logits, (target.shape[-2], target.shape[-1]))
            losses.append(2 * binary_cross_entropy(logits, target).mean() + 0.5 * dice_loss(logits, target).mean())
            ious.append(_iou(logits > 0, target))
        loss = torch.stack(losses).mean()
        optimizer.update(loss + LABEL_WEIGHT * label_loss)
        by_words = clip.words_R2.any(1)
        values = {"loss": loss.detach(), "iou_place": ious[0][~by_words].mean(), "iou_words": ious[0][by_words].mean()}
        if length > 1:
            values["iou_later"] = torch.cat(ious[1:]).mean()
        report(step, {name: float(value) for name, value in values.items()})
    segmenter.requires_grad_(False).eval()
    segmenter.note_trained()
    segmenter.memory_gradient = False


class WordPrompts(nn.Module):
    """Prompts in words, "red", "circle", "red circle": a learned embedding per word, thrown away after pre-training.

    They make SAM2's features tell colours and shapes apart, as real features do, and its decoder find them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.shape = nn.Embedding(1 + len(SHAPES), width, padding_idx=0)
        self.colour = nn.Embedding(1 + len(COLOURS), width, padding_idx=0)

    def forward(self, words_R2: torch.Tensor) -> torch.Tensor:
        """(R, 2) numbers of shape and colour from 1, 0 where not named -> (R, C)."""
        return self.shape(words_R2[:, 0]) + self.colour(words_R2[:, 1])


@dataclass(frozen=True)
class _Clip:
    """Frames of V videos and rows of objects to segment in them."""

    frames_FHWC: torch.Tensor
    frame_names: list[tuple[Scene, int]]
    video_R: torch.Tensor
    targets_RTHW: torch.Tensor
    words_R2: torch.Tensor
    """Shape and colour named, 0: not named; rows without words are prompted by place."""
    is_prompted_RT: torch.Tensor


def _draw_clip(rng: np.random.Generator, scenes: Sequence[Scene], batch_size: int, num_frames: int) -> _Clip:
    frames, names, videos, targets, named, prompted = [], [], [], [], [], []
    for video in range(batch_size):
        scene = scenes[int(rng.integers(len(scenes)))]
        start = int(rng.integers(len(scene.frames_THW3) - num_frames + 1))
        window = slice(start, start + num_frames)
        frames.append(scene.frames_THW3[window])
        names += [(scene, t) for t in range(start, start + num_frames)]
        for row in range(ROWS_PER_VIDEO):
            words, chosen = _draw_words(rng, scene) if row % 2 else _draw_objects(rng, scene)
            videos.append(video)
            named.append(words)
            targets.append(scene.masks_OTHW[chosen, window].any(0))
            prompted.append([t == 0 or rng.random() < 0.5 for t in range(num_frames)])
    return _Clip(
        torch.as_tensor(np.concatenate(frames)),
        names,
        torch.as_tensor(videos),
        torch.as_tensor(np.stack(targets)),
        torch.as_tensor(named),
        torch.as_tensor(prompted),
    )


def _draw_objects(rng: np.random.Generator, scene: Scene) -> tuple[tuple[int, int], list[int]]:
    """No words, and up to two objects."""
    count = int(rng.choice([0, 1, 2], p=[0.1, 0.65, 0.25]))
    return (0, 0), [int(i) for i in rng.choice(len(scene.objects), count, replace=False)]


def _draw_words(rng: np.random.Generator, scene: Scene) -> tuple[tuple[int, int], list[int]]:
    """Shape and colour (one of them may be left out) and all objects they fit, now and then none."""
    pick = [scene.objects[int(i)] for i in rng.integers(len(scene.objects), size=2)]
    # Words of one object, or, in one case of five, the shape of one and the colour of another: often none fits.
    shape, colour = pick[0].shape, pick[int(rng.random() < 0.2)].colour
    named = rng.choice(["shape", "colour", "both"], p=[0.25, 0.25, 0.5])
    fits = [
        i
        for i, item in enumerate(scene.objects)
        if (named == "colour" or item.shape == shape) and (named == "shape" or item.colour == colour)
    ]
    shape_word = 0 if named == "colour" else 1 + SHAPES.index(shape)
    return (shape_word, 0 if named == "shape" else 1 + list(COLOURS).index(colour)), fits


def _prompts(segmenter: Sam2Segmenter, words: WordPrompts, clip: _Clip, t: int) -> torch.Tensor:
    """Noisy prompts of each row, by place or by words, or "no point" where it is left to the memory: (R, C)."""
    by_words = clip.words_R2.any(1)
    is_prompted = clip.is_prompted_RT[:, t]
    hidden = by_words | ~is_prompted
    places = segmenter.mask_prompt(clip.targets_RTHW[:, t].masked_fill(hidden[:, None, None], False))
    prompts = torch.where((by_words & is_prompted)[:, None], words(clip.words_R2), places)
    return prompts + PROMPT_NOISE * torch.randn_like(prompts)


def _iou(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(R,) IoU of each mask; 1 where both are empty."""
    overlap = (masks & targets).flatten(1).sum(1).float()
    union = (masks | targets).flatten(1).sum(1).float()
    return torch.where(union > 0, overlap / union, torch.ones_like(union))
