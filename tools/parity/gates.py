"""How near a replayed number must come to the recorded one.

Source: the last column of the table at the end of the README of the parity fixtures ("Tolerances that an independent
replay reached"), float32 on a CPU. They bound float noise, not behaviour: what is wrong by design is off by far more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Measure(Enum):
    """Which of the two differences of a row a gate bounds."""

    absolute = "absolute"
    relative = "relative"


@dataclass(frozen=True)
class Gate:
    """The largest difference that passes."""

    limit: float
    measure: Measure


SEG_EMBEDDING = Gate(5e-5, Measure.relative)
"""[SEG] embeddings and those in the queue, relative to the largest value of the array."""
MASK_LOGITS = Gate(5e-5, Measure.relative)
"""Low-resolution mask logits and their minimum and maximum, relative to the frame's range."""
PREDICTED_IOU = Gate(1e-5, Measure.relative)
PROBE = Gate(1e-5, Measure.relative)
"""Intermediate values, relative to the largest value of the array."""
CLIP_INPUT = Gate(1e-6, Measure.absolute)
SAM2_INPUT = Gate(1e-5, Measure.absolute)
STABILITY = Gate(1e-3, Measure.absolute)
"""A ratio of pixel counts: one pixel more moves it."""
LOSS = Gate(1e-5, Measure.relative)
"""Each loss and each term of the contrastive loss, relative to itself."""
GRADIENT_TOTAL = Gate(1e-3, Measure.relative)
"""Norm over all tensors. The gates of gradients are wide because float noise can flip a ReLU of the mask decoder."""
GRADIENT_GROUP = Gate(5e-3, Measure.relative)
GRADIENT_TENSOR = Gate(1e-2, Measure.relative)
"""Norm of each tensor whose share of the total is above ``GRADIENT_NEGLIGIBLE``."""
GRADIENT_NEGLIGIBLE = 1e-6
"""Share of the total norm up to which a tensor's gradient is float noise."""
GRADIENT_NOISE = Gate(1e-6, Measure.relative)
"""Norm of each other tensor, relative to the total."""
GRADIENT_VALUES = Gate(3e-2, Measure.relative)
"""Full gradients, relative to the largest value of the tensor."""
