"""The official procedure for J and F, written plainly with numpy and OpenCV: what every faster way must equal.

Source: F. Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016),
as computed by the public davis2017-evaluation, which MeViS, Ref-YouTube-VOS and their relatives all reuse. Its quirks
are part of the definition:

- two empty masks agree perfectly (J = F = 1), so one false pixel in a frame without the object costs everything;
- a mask that covers the whole image has no boundary, hence F = 1 against an empty mask and 0 against most others;
- the tolerance of F grows with the image diagonal, so scores depend on the resolution they are computed at.

Scores are computed by ``bits.py``; this file is for the tests and the benchmark.
"""

from __future__ import annotations

import cv2
import numpy as np


def plain_region_similarity(prediction_HW: np.ndarray, target_HW: np.ndarray, void_HW: np.ndarray) -> float:
    """J of one frame: intersection over union of two bool masks outside a bool void mask; 1 if both are empty."""
    union = np.sum((prediction_HW | target_HW) & ~void_HW)
    if union == 0:
        return 1.0
    return float(np.sum(prediction_HW & target_HW & ~void_HW) / union)


def plain_boundary_accuracy(prediction_HW: np.ndarray, target_HW: np.ndarray, void_HW: np.ndarray) -> float:
    """F of one frame: harmonic mean of precision and recall of the boundary pixels of two bool masks.

    Void pixels (bool) are taken out of both masks before their boundaries are drawn. A boundary pixel matches if it
    lies in the other boundary dilated by a disk; nothing comes from outside the image.
    """
    radius = int(np.ceil(0.008 * np.linalg.norm(target_HW.shape)))
    prediction, target = plain_boundary(prediction_HW & ~void_HW), plain_boundary(target_HW & ~void_HW)
    num_prediction, num_target = np.sum(prediction), np.sum(target)
    if num_prediction == 0 or num_target == 0:
        return float(num_prediction == num_target)
    disk = plain_disk(radius)
    dilated_prediction = cv2.dilate(prediction.astype(np.uint8), disk)
    dilated_target = cv2.dilate(target.astype(np.uint8), disk)
    precision = np.sum(prediction * dilated_target) / float(num_prediction)
    recall = np.sum(target * dilated_prediction) / float(num_target)
    if precision + recall == 0:
        return 0.0
    return float(2 * precision * recall / (precision + recall))


def plain_boundary(mask_HW: np.ndarray) -> np.ndarray:
    """bool map of the pixels of a bool mask that differ from their right, lower or lower right neighbour.

    Neighbours outside the image are not compared, so the last row looks only right, the last column only down, and the
    last pixel never counts.
    """
    east, south, south_east = np.zeros_like(mask_HW), np.zeros_like(mask_HW), np.zeros_like(mask_HW)
    east[:, :-1] = mask_HW[:, 1:]
    south[:-1, :] = mask_HW[1:, :]
    south_east[:-1, :-1] = mask_HW[1:, 1:]
    boundary = (mask_HW ^ east) | (mask_HW ^ south) | (mask_HW ^ south_east)
    boundary[-1, :] = mask_HW[-1, :] ^ east[-1, :]
    boundary[:, -1] = mask_HW[:, -1] ^ south[:, -1]
    boundary[-1, -1] = False
    return boundary


def plain_disk(radius: int) -> np.ndarray:
    """uint8 (2 radius + 1, 2 radius + 1): 1 where x^2 + y^2 <= radius^2, which is ``skimage.morphology.disk``."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares[None, :] <= radius * radius).astype(np.uint8)
