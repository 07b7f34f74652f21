"""What is counted of a video before any benchmark's rules are applied to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from glus.data.mask_store import MaskStore
from glus.data.rle import Size
from glus.evaluation.packed import BitMasks, FrameScores
from glus.types import Expression

Observed = dict[str, np.ndarray]
"""What a benchmark measures besides, by name; the first axis of each array is frames."""


@dataclass(frozen=True)
class Chunk:
    """Some frames of a video, with the predictions for all its expressions."""

    expressions: Sequence[Expression]
    frames: range
    size: Size
    predictions: Sequence[BitMasks]
    """F masks per expression; empty where a frame could not be read."""
    target: Callable[[Expression], BitMasks]
    """Ground truth in these frames, of an expression, or of one that names other objects."""
    masks: MaskStore


@dataclass(frozen=True)
class Measured:
    """What was counted of one expression over its whole video."""

    expression: Expression
    size: Size
    frames: FrameScores
    """Of the frames for which there is a ground truth. J and F are 0 in frames that could not be read."""
    unusable_T: np.ndarray
    """bool: frames whose prediction could not be read; by every measure they count as the worst answer."""
    observed: Observed = field(default_factory=dict)
    """What the benchmark measures besides, for the whole video."""
    index: int = 0
    """Place of the expression in the video."""

    @property
    def visible_T(self) -> np.ndarray:
        """bool: frames in which an object is to be seen."""
        return self.frames.target_T > 0

    @property
    def answered_T(self) -> np.ndarray:
        """bool: frames with predicted foreground; the opposite of what is right where no prediction could be read."""
        return np.where(self.unusable_T, ~self.visible_T, self.frames.prediction_T > 0)
