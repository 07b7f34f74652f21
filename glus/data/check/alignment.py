"""Whether masks lie on the objects of their own frame, or fit other frames better.

ReVOS has videos whose mask ``i`` belongs to frame ``30 i``, and others whose masks drift (VISA#9, #18). No file says
so; but across an object's outline a picture mostly changes more than across lines beside it. So masks are held against
their own frame and others: those a fixed number of frames away, and those at a multiple of their number. Where nothing
moves they fit all, and nothing can be told. This is evidence, not proof: look at a video before you trust it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import cv2
import numpy as np

MAX_SIDE = 320
"""Longer side of the pictures in which edges are compared, in pixels; larger ones are reduced to it."""
BAND = 11
"""Width in pixels of the surroundings of an outline with which its edges are compared."""
NOISE = 2.0
"""Edges (Sobel, grey values 0 to 255) that are noise, so that even surroundings do not make them strong."""
SHIFTS = tuple(shift for shift in range(-5, 6) if shift)
STRIDES = (2, 3, 5, 6, 10, 15, 30)
MIN_FRAMES = 10
"""Masks that an explanation must hold for."""
MIN_OUTLINE = 16
"""Pixels of an outline that are worth comparing."""
MIN_GAIN = 0.05
"""Share by which edges along the outlines must be stronger in the other frames."""
MIN_SHARE = 0.9
"""Share of the masks that must fit their other frame better."""


@dataclass(frozen=True)
class Outline:
    """Where the edges of a frame's objects should be; empty where there is no object."""

    border_n: np.ndarray
    """int32 indices into a flattened frame: pixels on both sides of the outlines."""
    band_m: np.ndarray
    """int32: those around them."""
    normals_2n: np.ndarray
    """float16 unit vectors (x, y) across the outlines."""
    band_normals_2m: np.ndarray
    """float16: the same for the pixels around."""


_NOTHING = Outline(*(np.zeros(shape, kind) for shape, kind in ((0, "i4"), (0, "i4"), ((2, 0), "f2"), ((2, 0), "f2"))))


@dataclass(frozen=True)
class Misfit:
    """A better explanation of a video's masks."""

    rule: str
    """Which frames they fit: ``mask i fits frame i + 3``."""
    gain: float
    """By how much stronger edges are along the outlines there, as a share."""
    num_masks: int
    """Masks it was measured on."""


def gradients(image_HW3: np.ndarray) -> np.ndarray:
    """(2, h, w) float16: the gradient (x, y) of a picture, (H, W, 3) uint8, in grey values, at reduced size."""
    grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
    grey = cv2.GaussianBlur(_reduced(grey).astype(np.float32), (3, 3), 0)
    return _sobel(grey).astype(np.float16)


def outline(mask_HW: np.ndarray) -> Outline:
    """The outline of an object, (H, W) of 0/1, without what lies along the border of the picture."""
    mask = np.pad(_reduced(mask_HW.astype(np.float32)) >= 0.5, 1, mode="edge").astype(np.uint8)
    inner, outer = (
        cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((side, side), np.uint8))[1:-1, 1:-1] > 0
        for side in (3, BAND)
    )
    normal_2hw = _sobel(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2))[:, 1:-1, 1:-1]
    normal_2hw /= np.hypot(*normal_2hw) + 1e-6
    normals = normal_2hw.reshape(2, -1).astype(np.float16)
    border, band = (np.flatnonzero(where).astype(np.int32) for where in (inner, outer & ~inner))
    return Outline(border, band, normals[:, border], normals[:, band])


def unite(outlines: Sequence[Outline]) -> Outline:
    """Those of all objects of a frame; there may be none."""
    arrays = zip(*(astuple(one) for one in (_NOTHING, *outlines)), strict=True)
    return Outline(*(np.concatenate(parts, axis=-1) for parts in arrays))


def find_misfit(gradients_T: Sequence[np.ndarray], outlines_T: Sequence[Outline]) -> Misfit | None:
    """The best explanation of a video's masks, if it is clearly better than that they belong to their own frames.

    Args:
        gradients_T: ``gradients`` of every frame.
        outlines_T: ``outline`` of every frame's objects.

    Returns:
        None where masks fit their frames, where nothing moves, or where too little is in sight to tell.
    """
    own = {
        i: _strength(gradients_T[i], where) for i, where in enumerate(outlines_T) if len(where.border_n) >= MIN_OUTLINE
    }
    later = sorted(own)[len(own) // 2 :]  # where a drift has grown
    rules = {f"mask i fits frame i {shift:+d}": {i: i + shift for i in own} for shift in SHIFTS}
    rules |= {f"mask i fits frame {stride} i": {i: stride * i for i in own if i} for stride in STRIDES}
    drifts = {f"mask i of the second half fits frame i {shift:+d}": {i: i + shift for i in later} for shift in SHIFTS}
    return _best(gradients_T, outlines_T, own, rules) or _best(gradients_T, outlines_T, own, drifts)


def _best(
    gradients_T: Sequence[np.ndarray],
    outlines_T: Sequence[Outline],
    own: dict[int, float],
    rules: dict[str, dict[int, int]],
) -> Misfit | None:
    """The rule under which edges are strongest, if clearly stronger than ``own``; a rule gives masks their frames."""
    found = []
    for rule, frame_of in rules.items():
        pairs = [(i, j) for i, j in frame_of.items() if 0 <= j < len(gradients_T)]
        if len(pairs) < MIN_FRAMES:
            continue
        here = np.array([own[i] for i, _ in pairs])
        there = np.array([_strength(gradients_T[j], outlines_T[i]) for i, j in pairs])
        gain = float(there.mean() / max(here.mean(), 1e-6) - 1)
        if gain >= MIN_GAIN and (there > here).mean() >= MIN_SHARE:
            found.append(Misfit(rule, gain, len(pairs)))
    return max(found, key=lambda misfit: misfit.gain, default=None)


def _strength(gradient_2hw: np.ndarray, where: Outline) -> float:
    """How much stronger the picture changes across the outlines than across lines beside them."""
    flat = gradient_2hw.reshape(2, -1)
    border, band = (
        float(np.abs((flat[:, pixels] * normals).sum(0, dtype=np.float32)).mean())
        for pixels, normals in ((where.border_n, where.normals_2n), (where.band_m, where.band_normals_2m))
    )
    return border / (band + NOISE)


def _sobel(picture_HW: np.ndarray) -> np.ndarray:
    """(2, H, W) float32: the derivatives along x and y."""
    return np.stack([cv2.Sobel(picture_HW, cv2.CV_32F, 1, 0), cv2.Sobel(picture_HW, cv2.CV_32F, 0, 1)])


def _reduced(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return picture
    return cv2.resize(picture, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
