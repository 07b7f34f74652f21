"""Bring replayed values into the form in which recordings keep them."""

from __future__ import annotations

import numpy as np
import torch

from glus.tokens import IMAGE_ID


def expand_images(values: np.ndarray, ids: np.ndarray, tokens_per_frame: int) -> np.ndarray:
    """One value per recorded id (L,) -> one per token as the model takes them (L',): those of an image are repeated.

    Args:
        values: the ids themselves, or their labels.
        ids: ``IMAGE_ID`` stands for a whole image.
        tokens_per_frame: P.
    """
    return np.repeat(values, np.where(ids == IMAGE_ID, tokens_per_frame, 1))


def subsample(values: torch.Tensor, side: int) -> np.ndarray:
    """Every nth row and column of (..., m, m), from the first, such that ``side`` remain.

    Raises:
        ValueError: no n gives that.
    """
    full = values.shape[-1]
    if side < 1 or full % side:
        raise ValueError(f"recorded maps have side {side}; expected a divisor of {full}")
    return every_nth(values, full // side)


def every_nth(values: torch.Tensor, step: int) -> np.ndarray:
    """Every ``step``-th row and column, from the first."""
    return values[..., ::step, ::step].detach().numpy()


def map_range(logits: np.ndarray) -> np.ndarray:
    """Largest minus smallest value of each recorded map (..., m, m): (..., 1, 1)."""
    return np.ptp(logits, axis=(-2, -1), keepdims=True)
