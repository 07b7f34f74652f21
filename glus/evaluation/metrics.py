"""Region similarity J and boundary accuracy F of the DAVIS benchmark, per frame and bit for bit.

The definition and its quirks: ``reference.py``; how it is computed: ``bits.py``. Whoever needs both scores, or has
masks as run-length codes, calls ``bits.score_frames`` and packs once.
"""

from __future__ import annotations

import numpy as np

from glus.evaluation.bits import (
    BitMasks,
    boundary_counts,
    boundary_scores,
    region_counts,
    region_scores,
    without_void,
)


def region_similarity(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """J: intersection over union of the two masks in each frame.

    Args:
        prediction_THW: (T, H, W), any dtype; any non-zero pixel is foreground.
        target_THW: same shape and meaning.
        void_THW: same shape; non-zero pixels are taken out of both masks.

    Returns:
        (T,) float64 in [0, 1]; 1 where both masks are empty.

    Raises:
        ValueError: the shapes differ or are not (T, H, W).
    """
    return region_scores(region_counts(*_packed(prediction_THW, target_THW, void_THW)))


def boundary_accuracy(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """F: harmonic mean of precision and recall of the boundary pixels in each frame.

    A boundary pixel matches if a boundary pixel of the other mask lies within ``bits.boundary_radius`` of it.

    Args:
        prediction_THW: (T, H, W), any dtype; any non-zero pixel is foreground.
        target_THW: same shape and meaning.
        void_THW: same shape; non-zero pixels are taken out of both masks before their boundaries are drawn.

    Returns:
        (T,) float64 in [0, 1]; 1 where neither mask has a boundary, 0 where only one has.

    Raises:
        ValueError: the shapes differ or are not (T, H, W).
    """
    return boundary_scores(boundary_counts(*_packed(prediction_THW, target_THW, void_THW)))


def _packed(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None
) -> tuple[BitMasks, BitMasks]:
    """Both masks without void pixels."""
    if prediction_THW.ndim != 3 or prediction_THW.shape != target_THW.shape:
        raise ValueError(f"masks to compare: expected two (T, H, W), got {prediction_THW.shape}, {target_THW.shape}")
    if void_THW is not None and void_THW.shape != target_THW.shape:
        raise ValueError(f"void mask: expected {target_THW.shape} like the masks, got {void_THW.shape}")
    void = None if void_THW is None else BitMasks.from_dense(void_THW)
    return without_void(BitMasks.from_dense(prediction_THW), BitMasks.from_dense(target_THW), void)
