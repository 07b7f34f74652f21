"""CLIP: say, from each pooled visual token, what lies in every patch of it.

Real CLIP learns from captions; labels of patches (shape, colour, where the object's centre is) reach the same kind of
features in minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from glus.distributed import generator
from glus.models.mllm.llava import ClipEncoder, clip_crop
from glus.shapes.pretrain_labels import SCENE_STREAM, PatchHead, patch_labels
from glus.shapes.pretrain_optimize import Report, TowerOptimizer
from glus.shapes.scene import Scene


def pretrain_clip(
    encoder: ClipEncoder,
    scenes: Sequence[Scene],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> None:
    """Train the tower to label patches.

    Args:
        encoder: all of it is trained, then frozen.
        scenes: where frames come from.
        steps: optimizer steps.
        batch_size: frames per step.
        learning_rate: peak.
        seed: decides the frames.
        report: gets the loss, the error of places and the accuracies of every step.
    """
    grid = round((encoder.tokens_per_frame * encoder.pool) ** 0.5)
    head = PatchHead(encoder.width, encoder.pool)
    encoder.train().requires_grad_(True)
    optimizer = TowerOptimizer([encoder, head], learning_rate, steps)
    for step in range(steps):
        rng = generator(seed, SCENE_STREAM, 1, step)
        drawn = [scenes[i] for i in rng.integers(len(scenes), size=batch_size)]
        frames = [(scene, int(rng.integers(len(scene.frames_THW3)))) for scene in drawn]
        crops = np.stack([clip_crop(scene.frames_THW3[t], encoder.image_size) for scene, t in frames])
        loss, values = head(encoder(torch.as_tensor(crops).permute(0, 3, 1, 2)), patch_labels(frames, grid))
        optimizer.update(loss)
        report(step, {"loss": float(loss.detach()), **values})
    encoder.requires_grad_(False).eval()
