"""Pixels of Shapes, the generated benchmark: what one object is, and how objects and backgrounds are drawn.

Which objects a video has, how they move and what is said about them is ``scene.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 44, 44),
    "green": (48, 166, 62),
    "blue": (44, 92, 224),
    "yellow": (236, 206, 48),
    "purple": (164, 62, 196),
    "white": (236, 236, 236),
}
"""Name -> RGB in 0..255, before the jitter of each object."""
TEXTURES = ("plain", "stripes", "dots")
EXTENT = {"circle": 1.0, "square": 1.25, "triangle": 1.35, "star": 1.35}
"""Distance of the farthest point from the centre, in radii: chosen so that the shapes look equally large."""

_SUPERSAMPLING = 4
_SHADE = 0.68
"""Brightness of stripes and dots relative to the object's colour: visible, yet of the same nameable colour."""


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One moving object. A later object of a scene is drawn over the earlier ones."""

    object_id: int
    """Number in the scene from 0; also the rank in drawing order."""
    shape: str
    """One of ``SHAPES``."""
    colour_T: tuple[str, ...]
    """Name in ``COLOURS`` of what it is in each frame."""
    rgb_T3: np.ndarray
    """(T, 3) uint8: the colours as drawn, with a slight jitter."""
    texture: str
    """One of ``TEXTURES``."""
    texture_angle: float
    """Direction of stripes and dot rows in radians."""
    rotation: float
    """Rotation of the shape in radians; 0 is upright."""
    radius: float
    """Pixels; the shape reaches ``EXTENT[shape] * radius`` from its centre."""
    path_T2: np.ndarray
    """(T, 2) float64: centre (x, y) in pixels, one row per frame; pixel (0, 0) covers [0, 1) x [0, 1)."""


def outline(shape: str, rotation: float = 0.0) -> np.ndarray:
    """Corners of ``shape`` around the origin, (n, 2) float64 as (x, y) with y down, for radius 1."""
    extent = EXTENT[shape]
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        lengths = np.where(np.arange(10) % 2 == 0, extent, 0.5 * extent)
    else:
        num_corners = {"circle": 48, "square": 4, "triangle": 3}[shape]
        start = np.pi / 4 if shape == "square" else 0.0
        angles = start + np.arange(num_corners) * 2 * np.pi / num_corners
        lengths = np.full(num_corners, extent)
    angles = angles + rotation
    return np.stack([lengths * np.sin(angles), -lengths * np.cos(angles)], axis=1)


def _shade(item: SceneObject, side: int) -> np.ndarray:
    """(side, side) float32 brightness of the object's texture on the supersampled grid, centred on the object."""
    if item.texture == "plain":
        return np.ones((side, side), np.float32)
    axis = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) / (_SUPERSAMPLING * item.radius)
    cos, sin = np.cos(item.texture_angle), np.sin(item.texture_angle)
    along = axis[None, :] * cos + axis[:, None] * sin
    across = axis[:, None] * cos - axis[None, :] * sin
    if item.texture == "stripes":
        is_dark = (along / 0.55) % 1.0 < 0.45
    else:
        pitch = 0.62
        is_dark = np.hypot((along / pitch) % 1.0 - 0.5, (across / pitch) % 1.0 - 0.5) < 0.3
    return np.where(is_dark, _SHADE, 1.0).astype(np.float32)


def _sprite(item: SceneObject, rgb: tuple[int, ...]) -> np.ndarray:
    """The object on a supersampled square: (side, side, 4) uint8, RGB multiplied by coverage, then coverage."""
    half = int(np.ceil(EXTENT[item.shape] * item.radius)) + 2
    side = 2 * half * _SUPERSAMPLING
    coverage = np.zeros((side, side), np.uint8)
    corners = (outline(item.shape, item.rotation) * item.radius + half) * _SUPERSAMPLING - 0.5
    cv2.fillPoly(coverage, [np.round(corners * 16).astype(np.int32)], 255, shift=4)
    shaded = _shade(item, side)[..., None] * np.asarray(rgb, np.float32) * (coverage[..., None] > 0)
    return np.dstack([shaded.round().astype(np.uint8), coverage])


def _stamp(sprite: np.ndarray, centre: np.ndarray, size: int) -> tuple[np.ndarray, slice, slice] | None:
    """The sprite as it falls on the pixel grid: patch (h, w, 4) uint8 with its rows and columns; None if outside."""
    half = sprite.shape[0] // (2 * _SUPERSAMPLING)
    fine = np.round(centre * _SUPERSAMPLING).astype(int)
    column, row = fine // _SUPERSAMPLING
    right, down = fine % _SUPERSAMPLING
    shifted = np.roll(sprite, (down, right), axis=(0, 1)) if down or right else sprite  # its margin is empty
    patch = cv2.resize(shifted, (2 * half, 2 * half), interpolation=cv2.INTER_AREA)
    top, left = row - half, column - half
    rows, columns = slice(max(top, 0), min(top + 2 * half, size)), slice(max(left, 0), min(left + 2 * half, size))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return None
    return patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left], rows, columns


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth, muted, low-contrast texture: (size, size, 3) float32 in 0..255."""
    base = rng.uniform(70, 125) + rng.uniform(-12, 12, 3)
    picture = np.broadcast_to(base, (size, size, 3)).astype(np.float32)
    for cells, contrast in ((4, 12.0), (10, 6.0)):
        grid = rng.normal(0, contrast, (cells, cells, 1)) + rng.normal(0, contrast / 3, (cells, cells, 3))
        picture = picture + cv2.resize(grid.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture + rng.normal(0, 2.0, (size, size, 1)).astype(np.float32), 20, 175)


def render(objects: tuple[SceneObject, ...], background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a video.

    Args:
        objects: in drawing order; all paths have the same length T.
        background: (H, H, 3) float32 in 0..255.

    Returns:
        frames (T, H, H, 3) uint8 RGB, and masks (O, T, H, H) bool of the pixels at least half covered by the object
        and not half covered by a later one.
    """
    size, num_frames = background.shape[0], len(objects[0].path_T2)
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    masks = np.zeros((len(objects), num_frames, size, size), bool)
    sprites: dict[tuple[int, ...], np.ndarray] = {}
    for t in range(num_frames):
        canvas = background.copy()
        for number, item in enumerate(objects):
            rgb = tuple(item.rgb_T3[t].tolist())
            if (number, *rgb) not in sprites:
                sprites[number, *rgb] = _sprite(item, rgb)
            stamp = _stamp(sprites[number, *rgb], item.path_T2[t], size)
            if stamp is None:
                continue
            patch, rows, columns = stamp
            coverage = patch[..., 3:].astype(np.float32) / 255
            canvas[rows, columns] = canvas[rows, columns] * (1 - coverage) + patch[..., :3]
            is_covered = patch[..., 3] >= 128
            masks[:number, t, rows, columns] &= ~is_covered
            masks[number, t, rows, columns] = is_covered
        frames[t] = np.round(canvas)
    return frames, masks
