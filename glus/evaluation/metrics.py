"""Region similarity J and boundary accuracy F of the DAVIS benchmark, per frame and bit for bit.

Source: F. Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016),
as computed by the public davis2017-evaluation, which MeViS, Ref-YouTube-VOS and their relatives all reuse. Its quirks
are part of the definition:

- two empty masks agree perfectly (J = F = 1), so one false pixel in a frame without the object costs everything;
- a mask that covers the whole image has no boundary, hence F = 1 against an empty mask and 0 against most others;
- the tolerance of F grows with the image diagonal, so scores depend on the resolution they are computed at.

Only the window around the two masks is looked at. That is exact: boundaries lie inside it, and a dilated boundary is
only ever sampled where the other mask's boundary is.
"""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np

BOUNDARY_TOLERANCE = 0.008
"""Distance, as a share of the image diagonal, within which two boundaries match (davis2017-evaluation)."""


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
    masks_2THW = _foreground(prediction_THW, target_THW, void_THW)
    return np.array([_region_similarity(*frame) for frame in zip(*masks_2THW, strict=True)], dtype=np.float64)


def boundary_accuracy(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """F: harmonic mean of precision and recall of the boundary pixels in each frame.

    A boundary pixel matches if a boundary pixel of the other mask lies within ``boundary_radius`` of it.

    Args:
        prediction_THW: (T, H, W), any dtype; any non-zero pixel is foreground.
        target_THW: same shape and meaning.
        void_THW: same shape; non-zero pixels are taken out of both masks before their boundaries are drawn.

    Returns:
        (T,) float64 in [0, 1]; 1 where neither mask has a boundary, 0 where only one has.

    Raises:
        ValueError: the shapes differ or are not (T, H, W).
    """
    masks_2THW = _foreground(prediction_THW, target_THW, void_THW)
    return np.array([_boundary_accuracy(*frame) for frame in zip(*masks_2THW, strict=True)], dtype=np.float64)


def boundary_radius(height: int, width: int) -> int:
    """Matching distance of F in pixels for an image of this size: 8 at 480x854, 12 at 720x1280."""
    return math.ceil(BOUNDARY_TOLERANCE * math.sqrt(height * height + width * width))


def _foreground(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as uint8 of 0/1 without void pixels."""
    if prediction_THW.ndim != 3 or prediction_THW.shape != target_THW.shape:
        raise ValueError(f"masks to compare: expected two (T, H, W), got {prediction_THW.shape}, {target_THW.shape}")
    prediction, target = prediction_THW != 0, target_THW != 0
    if void_THW is not None:
        if void_THW.shape != target_THW.shape:
            raise ValueError(f"void mask: expected {target_THW.shape} like the masks, got {void_THW.shape}")
        prediction, target = prediction & (void_THW == 0), target & (void_THW == 0)
    return prediction.view(np.uint8), target.view(np.uint8)


def _region_similarity(prediction_HW: np.ndarray, target_HW: np.ndarray) -> float:
    union = cv2.countNonZero(cv2.bitwise_or(prediction_HW, target_HW))
    if union == 0:
        return 1.0
    return cv2.countNonZero(cv2.bitwise_and(prediction_HW, target_HW)) / union


def _boundary_accuracy(prediction_HW: np.ndarray, target_HW: np.ndarray) -> float:
    window = _window(prediction_HW, target_HW)
    if window is None:
        return 1.0
    prediction, target = _boundary(prediction_HW[window]), _boundary(target_HW[window])
    num_prediction, num_target = cv2.countNonZero(prediction), cv2.countNonZero(target)
    if num_prediction == 0 or num_target == 0:
        return float(num_prediction == num_target)
    height, width = target_HW.shape
    disk = _disk(boundary_radius(height, width))  # cv2.dilate's default border adds nothing from outside the image
    precision = cv2.countNonZero(cv2.bitwise_and(prediction, cv2.dilate(target, disk))) / num_prediction
    recall = cv2.countNonZero(cv2.bitwise_and(target, cv2.dilate(prediction, disk))) / num_target
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def _window(prediction_HW: np.ndarray, target_HW: np.ndarray) -> tuple[slice, slice] | None:
    """Bounding box of both masks with one pixel around it where the image goes on; None if both are empty.

    That one pixel makes the edges of the window equal to the inside of the image: they hold no boundary, except where
    the window ends with the image and the image's own rule applies.
    """
    left, top, width, height = cv2.boundingRect(cv2.bitwise_or(prediction_HW, target_HW))
    if width == 0:
        return None
    return slice(max(top - 1, 0), top + height + 1), slice(max(left - 1, 0), left + width + 1)


def _boundary(mask_HW: np.ndarray) -> np.ndarray:
    """uint8 map of the pixels that differ from their right, lower or lower right neighbour.

    Neighbours outside the image are not compared, so the last row looks only right, the last column only down, and
    the last pixel never counts.
    """
    edge = np.zeros_like(mask_HW)
    edge[:, :-1] = mask_HW[:, :-1] ^ mask_HW[:, 1:]
    edge[:-1, :] |= mask_HW[:-1, :] ^ mask_HW[1:, :]
    edge[:-1, :-1] |= mask_HW[:-1, :-1] ^ mask_HW[1:, 1:]
    return edge


@cache
def _disk(radius: int) -> np.ndarray:
    """uint8 (2 radius + 1, 2 radius + 1): 1 where x^2 + y^2 <= radius^2."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares[None, :] <= radius * radius).astype(np.uint8)
