"""Whether masks lie on the objects of their own frame, or fit other frames better.

ReVOS has videos whose mask ``i`` belongs to frame ``30 i``, and others whose masks drift (VISA#9, #18). No file says
so; but an object's outline mostly runs along edges of the picture, so masks are compared with the edges of their own
frame and of others: those a fixed number of frames away, and those at a multiple of their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

MAX_SIDE = 320
"""Longer side of the pictures in which edges are compared, in pixels; larger ones are reduced to it."""
SHIFTS = tuple(shift for shift in range(-5, 6) if shift)
STRIDES = (2, 3, 5, 6, 10, 15, 30)
MIN_FRAMES = 8
"""Masks that an explanation must hold for."""
MIN_OUTLINE = 16
"""Pixels of an outline that are worth comparing."""
MIN_GAIN = 0.05
"""Share by which edges along the outlines must be stronger in the other frames."""
MIN_SHARE = 0.9
"""Share of the masks that must fit their other frame better."""


@dataclass(frozen=True)
class Misfit:
    """A better explanation of a video's masks."""

    rule: str
    """Which frames they fit: ``mask i fits frame i + 3``."""
    gain: float
    """By how much stronger edges are along the outlines there, as a share."""
    num_masks: int
    """Masks it was measured on."""


def edge_map(image_HW3: np.ndarray) -> np.ndarray:
    """(h, w) float16: strength of the edges of a picture, (H, W, 3) uint8, relative to their mean over the picture."""
    grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
    grey = cv2.GaussianBlur(_reduced(grey).astype(np.float32), (3, 3), 0)
    strength = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return (strength / (strength.mean() + 1)).astype(np.float16)


def outline(mask_HW: np.ndarray) -> np.ndarray:
    """(n,) indices into a flattened ``edge_map``: pixels on both sides of a mask's outline, but none at the border."""
    mask = np.pad(_reduced(mask_HW.astype(np.float32)) >= 0.5, 1, mode="edge").astype(np.uint8)
    is_outline = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))[1:-1, 1:-1] > 0
    return np.flatnonzero(is_outline)


def find_misfit(edges_T: Sequence[np.ndarray], outlines_T: Sequence[np.ndarray]) -> Misfit | None:
    """The best explanation of a video's masks, if it is clearly better than that they belong to their own frames.

    Args:
        edges_T: ``edge_map`` of every frame.
        outlines_T: ``outline`` of every frame's mask; empty where there is no object.

    Returns:
        None where masks fit their frames, where nothing moves, or where too little is in sight to tell.
    """
    own = {i: _strength(edges_T[i], pixels) for i, pixels in enumerate(outlines_T) if len(pixels) >= MIN_OUTLINE}
    later = sorted(own)[len(own) // 2 :]  # where a drift has grown
    rules = {f"mask i fits frame i {shift:+d}": {i: i + shift for i in own} for shift in SHIFTS}
    rules |= {f"mask i fits frame {stride} i": {i: stride * i for i in own if i} for stride in STRIDES}
    drifts = {f"mask i of the second half fits frame i {shift:+d}": {i: i + shift for i in later} for shift in SHIFTS}
    return _best(edges_T, outlines_T, own, rules) or _best(edges_T, outlines_T, own, drifts)


def _best(
    edges_T: Sequence[np.ndarray],
    outlines_T: Sequence[np.ndarray],
    own: dict[int, float],
    rules: dict[str, dict[int, int]],
) -> Misfit | None:
    """The rule under which edges are strongest, if clearly stronger than ``own``; a rule gives masks their frames."""
    found = []
    for rule, frame_of in rules.items():
        pairs = [(i, j) for i, j in frame_of.items() if 0 <= j < len(edges_T)]
        if len(pairs) < MIN_FRAMES:
            continue
        here = np.array([own[i] for i, _ in pairs])
        there = np.array([_strength(edges_T[j], outlines_T[i]) for i, j in pairs])
        gain = float(there.mean() / max(here.mean(), 1e-6) - 1)
        if gain >= MIN_GAIN and (there > here).mean() >= MIN_SHARE:
            found.append(Misfit(rule, gain, len(pairs)))
    return max(found, key=lambda misfit: misfit.gain, default=None)


def _strength(edges: np.ndarray, pixels: np.ndarray) -> float:
    return float(edges.reshape(-1)[pixels].mean(dtype=np.float64))


def _reduced(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return picture
    return cv2.resize(picture, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
