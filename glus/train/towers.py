"""Pre-training of a small CLIP tower and a small SAM2 on generated frames.

A full-size GLUS starts from towers that have seen the world and stay frozen. A small one has none to download, so it
pre-trains its own, by dense supervision that generated scenes give for free, and then freezes them just the same:

* CLIP learns to say, from each pooled visual token, what lies in every patch of it: shape, colour, and where the
  object's centre is. (Real CLIP learns from captions; patch labels reach the same kind of features in minutes.)
* SAM2 learns what SAM2 learns: prompt -> mask in the first frame, and memory -> mask in later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from glus.data.shapes import Scene, generate_scene
from glus.data.shapes_render import COLOURS, SHAPES
from glus.data.transforms import clip_crop
from glus.distributed import generator
from glus.losses.mask import binary_cross_entropy, dice_loss
from glus.models.clip import ClipEncoder
from glus.models.glus import segment_step
from glus.models.memory import MemoryBank
from glus.models.sam2 import Sam2Segmenter, upsample_masks
from glus.train.optim import build_adamw, warmup_hold_decay

SCENE_STREAM = 100
"""Number of the generator stream of these scenes; the benchmark's splits are other streams."""
ROWS_PER_VIDEO = 4
"""Targets drawn in each clip of SAM2's pre-training; the image encoder runs once for all of them."""
PLACE_WAVES = np.array([1.0, 2.0, 3.0, 4.0])
"""Half waves across the frame, in which patches tell where their object's centre is."""
PROMPT_NOISE = 0.05
"""Standard deviation of the noise on prompts, whose own entries are about 0.7: the LLM's will not be perfect."""
WARMUP_STEPS = 60
SINGLE_FRAME_IOU, SINGLE_FRAME_SHARE = 0.65, 0.6
"""SAM2 sees single frames until the running mean of their IoU reaches the first, or for this share of the steps at
most: prompts are learned before memory (measured: three-frame clips from the start had not left IoU 0.2 after 350
steps, single frames reached 0.5 in as many seconds). When the jump to following the prompt comes varies."""
BACKGROUND_WEIGHT = 0.2
"""Of background patches in the patch labels' cross-entropy; four out of five patches are background."""


def draw_scenes(seed: int, count: int, num_frames: int, size: int) -> list[Scene]:
    """Scenes of their own, shared by no split of the benchmark."""
    return [generate_scene(generator(seed, SCENE_STREAM, i), num_frames, size) for i in range(count)]


@dataclass(frozen=True)
class PatchLabels:
    """What lies in each patch of a frame: the object that covers most of it."""

    shape: np.ndarray
    """(G*G,) int64, 0 = background, else 1 + index into SHAPES."""
    colour: np.ndarray
    """(G*G,) int64, 0 = background, else 1 + index into COLOURS."""
    place: np.ndarray
    """(G*G, 2 * len(PLACE_WAVES) * 2) float32 in [-1, 1]: sine and cosine of the object centre's x and y at a few
    frequencies; 0 on background."""


def patch_labels(scene: Scene, frame: int, grid: int, min_cover: float = 0.15) -> PatchLabels:
    """Labels of one frame on a ``grid`` x ``grid`` raster.

    Args:
        scene: square frames whose side is a multiple of ``grid``.
        frame: index.
        grid: patches per row.
        min_cover: share of a patch that its object must cover, else the patch is background.
    """
    masks = scene.masks_OTHW[:, frame]
    side = masks.shape[-1]
    cover = masks.reshape(len(masks), grid, side // grid, grid, side // grid).mean((2, 4)).reshape(len(masks), -1)
    owner = cover.argmax(0)
    is_object = cover.max(0) >= min_cover
    shapes = np.array([1 + SHAPES.index(item.shape) for item in scene.objects])
    colours = np.array([1 + list(COLOURS).index(item.colour) for item in scene.objects])
    centres = np.stack([item.path_T2[frame] for item in scene.objects]) / side
    angles = (np.pi * centres[:, :, None] * PLACE_WAVES).reshape(len(centres), -1)
    places = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return PatchLabels(
        shape=np.where(is_object, shapes[owner], 0),
        colour=np.where(is_object, colours[owner], 0),
        place=np.where(is_object[:, None], places[owner], 0).astype(np.float32),
    )


class PatchHead(nn.Module):
    """Reads the labels of all patches of a visual token; thrown away after pre-training."""

    def __init__(self, width: int, pool: int):
        super().__init__()
        self.sizes = (1 + len(SHAPES), 1 + len(COLOURS), 4 * len(PLACE_WAVES))
        self.pool = pool
        self.linear = nn.Linear(width, pool * sum(self.sizes))

    def forward(self, features_FPC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(F, P, width) -> logits of shape and colour, and places, (F, P * pool, size) each."""
        return self.linear(features_FPC).unflatten(-1, (self.pool, -1)).flatten(1, 2).split(self.sizes, dim=-1)


def pretrain_clip(
    encoder: ClipEncoder,
    scenes: Sequence[Scene],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Train the tower to label patches; ``report(step, values)`` gets the loss and accuracies of every step."""
    grid = round((encoder.tokens_per_frame * encoder.pool) ** 0.5)
    head = PatchHead(encoder.width, encoder.pool)
    optimizer = build_adamw([*encoder.parameters(), *head.parameters()], learning_rate, (0.9, 0.98), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_hold_decay(WARMUP_STEPS, steps))
    encoder.train().requires_grad_(True)
    for step in range(steps):
        rng = generator(seed, SCENE_STREAM, 1, step)
        drawn = [scenes[i] for i in rng.integers(len(scenes), size=batch_size)]
        frames = [int(rng.integers(len(scene.frames_THW3))) for scene in drawn]
        pairs = list(zip(drawn, frames, strict=True))
        crops = np.stack([clip_crop(scene.frames_THW3[t], encoder.image_size) for scene, t in pairs])
        labels = [patch_labels(scene, t, grid) for scene, t in pairs]
        shape, colour, place = (
            torch.as_tensor(np.stack([getattr(label, name) for label in labels])).flatten(0, 1)
            for name in ("shape", "colour", "place")
        )
        shape_logits, colour_logits, places = (
            out.flatten(0, 1) for out in head(encoder(torch.as_tensor(crops).permute(0, 3, 1, 2)))
        )
        is_object = shape > 0
        rarity = torch.ones(1 + len(SHAPES)), torch.ones(1 + len(COLOURS))
        for weights in rarity:
            weights[0] = BACKGROUND_WEIGHT
        place_error = (places - place)[is_object].abs().mean()
        loss = F.cross_entropy(shape_logits, shape, rarity[0]) + F.cross_entropy(colour_logits, colour, rarity[1])
        loss = loss + 5 * place_error
        _update(loss, optimizer, schedule)
        right = {"shape": (shape_logits.argmax(-1) == shape), "colour": (colour_logits.argmax(-1) == colour)}
        values = {name: float(hit[is_object].float().mean()) for name, hit in right.items()}
        report(step, {"loss": float(loss), "place": float(place_error), **values})
    encoder.requires_grad_(False).eval()


def pretrain_sam2(
    segmenter: Sam2Segmenter,
    scenes: Sequence[Scene],
    steps: int,
    batch_size: int,
    num_frames: int,
    learning_rate: float,
    seed: int,
    report: Callable[[int, dict[str, float]], None],
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
        report: gets the loss and the IoU of the first frame and of later ones of every step.
    """
    words = WordPrompts(segmenter.width)
    optimizer = build_adamw([*segmenter.parameters(), *words.parameters()], learning_rate, (0.9, 0.98), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_hold_decay(WARMUP_STEPS, steps))
    segmenter.train().requires_grad_(True)
    length, running_iou = 1, 0.0
    for step in range(steps):
        if running_iou >= SINGLE_FRAME_IOU or step >= SINGLE_FRAME_SHARE * steps:
            length = num_frames
        clip = _draw_clip(generator(seed, SCENE_STREAM, 2, step), scenes, batch_size, length)
        features = segmenter.encode_frames(segmenter.prepare_frames(clip.frames_FHWC))
        bank = MemoryBank(num_frames=7, stride=1, detach=False)
        losses, ious = [], []
        rows = range(len(clip.targets_RTHW))
        for t in range(length):
            prompt = _prompts(segmenter, words, clip, t)
            frame = features.rows(clip.video_R * length + t)
            logits = segment_step(segmenter, bank, t, frame, prompt, rows).logits_Nmm
            target = clip.targets_RTHW[:, t]
            logits = upsample_masks(logits, (target.shape[-2], target.shape[-1]))
            losses.append(2 * binary_cross_entropy(logits, target).mean() + 0.5 * dice_loss(logits, target).mean())
            ious.append(_mean_iou(logits > 0, target))
        _update(torch.stack(losses).mean(), optimizer, schedule)
        running_iou = 0.95 * running_iou + 0.05 * ious[0]
        later = sum(ious[1:]) / max(1, len(ious) - 1)
        report(step, {"loss": float(torch.stack(losses).mean().detach()), "iou_first": ious[0], "iou_later": later})
    segmenter.requires_grad_(False).eval()


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
    video_R: torch.Tensor
    targets_RTHW: torch.Tensor
    words_R2: torch.Tensor
    """Shape and colour named, 0: not named; rows without words are prompted by place."""
    is_prompted_RT: torch.Tensor


def _draw_clip(rng: np.random.Generator, scenes: Sequence[Scene], batch_size: int, num_frames: int) -> _Clip:
    frames, videos, targets, named, prompted = [], [], [], [], []
    for video in range(batch_size):
        scene = scenes[int(rng.integers(len(scenes)))]
        start = int(rng.integers(len(scene.frames_THW3) - num_frames + 1))
        window = slice(start, start + num_frames)
        frames.append(scene.frames_THW3[window])
        for row in range(ROWS_PER_VIDEO):
            words, chosen = _draw_words(rng, scene) if row % 2 else _draw_objects(rng, scene)
            videos.append(video)
            named.append(words)
            targets.append(scene.masks_OTHW[chosen, window].any(0))
            prompted.append([t == 0 or rng.random() < 0.5 for t in range(num_frames)])
    return _Clip(
        torch.as_tensor(np.concatenate(frames)),
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


def _mean_iou(masks: torch.Tensor, targets: torch.Tensor) -> float:
    overlap = (masks & targets).flatten(1).sum(1).float()
    union = (masks | targets).flatten(1).sum(1).float()
    return float(torch.where(union > 0, overlap / union, torch.ones_like(union)).mean())


def _update(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
