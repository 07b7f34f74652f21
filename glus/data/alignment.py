"""Whether masks lie on the objects of their own frame, or fit other frames better.

ReVOS has videos whose mask ``i`` belongs to frame ``30 i``, and others whose masks drift (VISA#9, #18). No file says
so; but across an object's outline a picture mostly changes more than across lines beside it. So masks are held against
their own frame and others: those a fixed number of frames away, and those at a multiple of their number. Where nothing
moves they fit all, and nothing can be told. This is evidence, not proof: look at a video before you trust it.
"""

from __future__ import annotations

from collections.abc import Sequence

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
MIN_PAIRS = 10
"""Masks that an explanation must hold for."""
MIN_OUTLINE = 16
"""Pixels of an outline that are worth comparing."""
MIN_GAIN = 0.05
"""Share by which edges along the outlines must be stronger in the other frames."""
MIN_SHARE = 0.9
"""Share of the masks that must fit their other frame better."""

OUTLINE = np.dtype([("pixel", "i4"), ("normal", "f2", 2), ("is_border", bool)])
"""A pixel at an outline: index into the flattened frame, unit vector (x, y) across the outline, and whether the pixel
touches the outline or lies in its surroundings."""


def gradients(image_HW3: np.ndarray) -> np.ndarray:
    """(2, h, w) float16: the gradient (x, y) of a picture, (H, W, 3) uint8, in grey values, at reduced size."""
    grey = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY)
    grey = cv2.GaussianBlur(_reduced(grey).astype(np.float32), (3, 3), 0)
    return _sobel(grey).astype(np.float16)


def mask_outline(mask_HW: np.ndarray) -> np.ndarray:
    """(n,) ``OUTLINE`` of an object, (H, W) of 0/1, without what lies along the border of the picture."""
    mask = np.pad(_reduced(mask_HW.astype(np.float32)) >= 0.5, 1, mode="edge").astype(np.uint8)
    border, surroundings = (
        cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((side, side), np.uint8))[1:-1, 1:-1].ravel() > 0
        for side in (3, BAND)
    )
    normal_2hw = _sobel(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2))[:, 1:-1, 1:-1]
    normal_2hw /= np.hypot(*normal_2hw) + 1e-6
    pixels = np.flatnonzero(border | surroundings)
    found = np.empty(len(pixels), OUTLINE)
    found["pixel"], found["is_border"] = pixels, border[pixels]
    found["normal"] = normal_2hw.reshape(2, -1)[:, pixels].T
    return found


def find_misfit(gradients_T: Sequence[np.ndarray], outlines_T: Sequence[np.ndarray]) -> str | None:
    """A better explanation of a video's masks than that they belong to their own frames, if there clearly is one.

    Args:
        gradients_T: ``gradients`` of every frame.
        outlines_T: ``mask_outline`` of every frame's objects, one after another.

    Returns:
        None where masks fit their frames, where nothing moves, or where too little is in sight to tell.
    """
    own = {
        i: _strength(gradients_T[i], where)
        for i, where in enumerate(outlines_T)
        if where["is_border"].sum() >= MIN_OUTLINE
    }
    later = sorted(own)[len(own) // 2 :]  # where a drift has grown
    rules = {f"mask i fits frame i {shift:+d}": {i: i + shift for i in own} for shift in SHIFTS}
    rules |= {f"mask i fits frame {stride} i": {i: stride * i for i in own if i} for stride in STRIDES}
    drifts = {f"mask i of the second half fits frame i {shift:+d}": {i: i + shift for i in later} for shift in SHIFTS}
    return _best(gradients_T, outlines_T, own, rules) or _best(gradients_T, outlines_T, own, drifts)


def _best(
    gradients_T: Sequence[np.ndarray],
    outlines_T: Sequence[np.ndarray],
    own: dict[int, float],
    rules: dict[str, dict[int, int]],
) -> str | None:
    """The rule under which edges are strongest, if clearly stronger than ``own``; a rule gives masks their frames."""
    found = []
    for rule, frame_of in rules.items():
        pairs = [(i, j) for i, j in frame_of.items() if 0 <= j < len(gradients_T)]
        if len(pairs) < MIN_PAIRS:
            continue
        here = np.array([own[i] for i, _ in pairs])
        there = np.array([_strength(gradients_T[j], outlines_T[i]) for i, j in pairs])
        gain = float(there.mean() / max(here.mean(), 1e-6) - 1)
        if gain >= MIN_GAIN and (there > here).mean() >= MIN_SHARE:
            edges = f"edges along {len(pairs)} outlines are {100 * gain:.0f} % stronger there"
            found.append((gain, f"{rule} better than its own: {edges}"))
    return max(found)[1] if found else None


def _strength(gradient_2hw: np.ndarray, where: np.ndarray) -> float:
    """How much stronger the picture changes across the outlines than across lines beside them."""
    flat, is_border = gradient_2hw.reshape(2, -1), where["is_border"]
    across = np.abs((flat[:, where["pixel"]] * where["normal"].T).sum(0, dtype=np.float32))
    border, surroundings = float(across[is_border].mean()), float(across[~is_border].mean())
    return border / (surroundings + NOISE)


def _sobel(picture_HW: np.ndarray) -> np.ndarray:
    """(2, H, W) float32: the derivatives along x and y."""
    return np.stack([cv2.Sobel(picture_HW, cv2.CV_32F, 1, 0), cv2.Sobel(picture_HW, cv2.CV_32F, 0, 1)])


def _reduced(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return picture
    return cv2.resize(picture, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
