"""Scenes of their own, the labels they come with, and the throw-away head that reads labels off image features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from glus.distributed import generator
from glus.shapes.render import COLOURS, SHAPES
from glus.shapes.scene import Scene, generate_scene

SCENE_STREAM = 100
"""Number of the generator stream of these scenes; the benchmark's splits are other streams."""
PLACE_WAVES = np.array([1.0, 2.0, 3.0, 4.0])
"""Half waves across the frame, in which patches tell where their object's centre is."""
MIN_COVER = 0.15
"""Share of a patch that its object must cover, else the patch is background."""
BACKGROUND_WEIGHT = 0.2
"""Of background patches in the cross-entropies; four out of five patches are background."""
PLACE_WEIGHT = 5.0
"""Of the mean absolute error of places, whose entries lie in [-1, 1], beside the two cross-entropies."""


def draw_scenes(seed: int, count: int, num_frames: int, size: int) -> list[Scene]:
    """Scenes of their own, shared by no split of the benchmark."""
    return [generate_scene(generator(seed, SCENE_STREAM, i), num_frames, size) for i in range(count)]


@dataclass(frozen=True)
class PatchLabels:
    """What lies in each patch of frames: the object that covers most of it."""

    shape: torch.Tensor
    """(F, G*G) int64, 0 = background, else 1 + index into SHAPES."""
    colour: torch.Tensor
    """(F, G*G) int64, 0 = background, else 1 + index into COLOURS."""
    place: torch.Tensor
    """(F, G*G, 4 * len(PLACE_WAVES)) float32 in [-1, 1]: sine and cosine of the object centre's x and y at a few
    frequencies; 0 on background."""


def patch_labels(frames: Sequence[tuple[Scene, int]], grid: int) -> PatchLabels:
    """Labels of some frames on a ``grid`` x ``grid`` raster.

    Args:
        frames: scenes, and which frame of each; square, with a side that is a multiple of ``grid``.
        grid: patches per row.
    """
    labels = [_label_frame(scene, t, grid) for scene, t in frames]
    return PatchLabels(*(torch.as_tensor(np.stack(part)) for part in zip(*labels, strict=True)))


def _label_frame(scene: Scene, frame: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    masks = scene.masks_OTHW[:, frame]
    side = masks.shape[-1]
    cover = masks.reshape(len(masks), grid, side // grid, grid, side // grid).mean((2, 4)).reshape(len(masks), -1)
    owner = cover.argmax(0)
    is_object = cover.max(0) >= MIN_COVER
    shapes = np.array([1 + SHAPES.index(item.shape) for item in scene.objects])
    colours = np.array([1 + list(COLOURS).index(item.colour) for item in scene.objects])
    centres = np.stack([item.path_T2[frame] for item in scene.objects]) / side
    angles = (np.pi * centres[:, :, None] * PLACE_WAVES).reshape(len(centres), -1)
    places = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return (
        np.where(is_object, shapes[owner], 0),
        np.where(is_object, colours[owner], 0),
        np.where(is_object[:, None], places[owner], 0).astype(np.float32),
    )


class PatchHead(nn.Module):
    """Reads the labels of all patches off image features; thrown away after pre-training.

    Args:
        width: of a feature.
        pool: patches that share a feature.
    """

    def __init__(self, width: int, pool: int):
        super().__init__()
        self.sizes = (1 + len(SHAPES), 1 + len(COLOURS), 4 * len(PLACE_WAVES))
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
