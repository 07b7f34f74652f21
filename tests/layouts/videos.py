"""The videos and pictures that every layout holds: disks over noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SIZE = (36, 52)
NUM_FRAMES = 5


@dataclass(frozen=True)
class Video:
    """Three disks that wander over noise: the second overlaps the first, the third is absent in the first frame."""

    name: str
    frames: tuple[str, ...]
    objects_OTHW: np.ndarray
    """bool: each disk as a whole, whatever hides it."""
    pixels_THW3: np.ndarray


def make_video(name: str, seed: int, num_frames: int = NUM_FRAMES, step: int = 1, first: int = 0) -> Video:
    """A video whose frames are called by numbers of five digits."""
    rng = np.random.default_rng(seed)
    y_H1, x_1W = np.ogrid[: SIZE[0], : SIZE[1]]
    starts = rng.integers((12, 12), (SIZE[0] - 12, SIZE[1] - 24), (3, 2))
    starts[1] = starts[0] + 4
    objects = np.stack(
        [
            np.stack([(y_H1 - y) ** 2 + (x_1W - x - 2 * t) ** 2 <= radius**2 for t in range(num_frames)])
            for (y, x), radius in zip(starts, (7, 6, 4), strict=True)
        ]
    )
    objects[2, 0] = False
    pixels = rng.integers(0, 90, (num_frames, *SIZE, 3), dtype=np.uint8)
    for number, masks_THW in enumerate(objects):
        pixels[masks_THW] = np.roll((240, 130, 20), number)
    return Video(name, tuple(f"{first + step * t:05d}" for t in range(num_frames)), objects, pixels)


def make_picture(name: str, seed: int) -> Video:
    """A video of one frame of its own name."""
    return replace(make_video(name, seed, num_frames=1), frames=(name,))


def visible_parts(objects_OTHW: np.ndarray) -> np.ndarray:
    """Each object without what later objects hide."""
    hidden = np.zeros(objects_OTHW.shape[1:], bool)
    visible = np.zeros_like(objects_OTHW)
    for number in reversed(range(len(objects_OTHW))):
        visible[number] = objects_OTHW[number] & ~hidden
        hidden |= objects_OTHW[number]
    return visible


def object_ids(visible_OTHW: np.ndarray) -> np.ndarray:
    """(T, H, W) uint8: 0, or the number from 1 of the object that is seen."""
    numbers = np.arange(1, len(visible_OTHW) + 1, dtype=np.uint8)
    return (visible_OTHW * numbers[:, None, None, None]).max(0)
