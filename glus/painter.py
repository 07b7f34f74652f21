"""Masks on a frame, for people to look at: fills, outlines, labels at objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter1d

from glus.fonts import Colour, ascent, draw_text, text_width

SENTENCE_COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (136, 0, 170), (204, 0, 17), (102, 102, 255), (153, 238, 170), (170, 102, 153)),
    *((221, 221, 34), (17, 119, 85), (204, 17, 204), (221, 119, 68), (51, 170, 119), (51, 0, 255), (153, 136, 255)),
    *((153, 17, 119), (85, 221, 204), (68, 102, 0), (187, 204, 119), (255, 34, 187), (153, 68, 153), (170, 119, 204)),
    *((187, 68, 85), (0, 238, 255), (255, 119, 204), (119, 0, 204), (255, 170, 170), (136, 187, 119), (187, 102, 0)),
)
"""Orange and sky blue of Okabe and Ito, then always the colour that is farthest from all before it, as seen by the eyes
that tell it from them least: normal ones, or those without one of the three kinds of cones."""

FILL = 0.45
"""Share of the colour in a mask's inside."""
PAPER: Colour = (255, 255, 255)
INK: Colour = (20, 20, 20)
NOTHING = "nothing"
"""Stands in a picture where the answer to a sentence is empty."""

_FINE = 4
"""Lines are drawn this many times larger, and reduced, for smooth edges."""
_CLEARLY = 1.25
"""A mask moves below another when it has become this many times larger, so that masks of one size do not swap."""
_FOLLOW = 0.4
"""Share of the way to its object that a label goes in a frame."""
_YIELD = 0.3
"""How far it moves aside in a frame at most, of the size of its letters."""


def palette(count: int) -> list[Colour]:
    """Colours for ``count`` sentences, the first 28 distinct, also without one kind of cone; those behind them have
    the same again, and are told apart by their numbers alone."""
    return list(islice(cycle(SENTENCE_COLOURS), count))


def overlay(
    frame_HW3: np.ndarray,
    masks_EHW: np.ndarray,
    colours: Sequence[Colour],
    stack: Sequence[int] | None = None,
    fill: float = FILL,
) -> np.ndarray:
    """Each mask as a translucent fill in one outline on a light rim, so that it shows on its own colour too.

    Where masks overlap, the uppermost alone is seen. Outlines are of one width everywhere: they are left out below
    other masks, at the edge of the frame, and around specks.

    Args:
        frame_HW3: uint8 RGB.
        masks_EHW: bool.
        colours: one per mask.
        stack: numbers of the masks, the lowest first; None: the largest first.
        fill: share of the colour in a mask's inside.

    Returns:
        (H, W, 3) uint8.
    """
    stack = restack((), masks_EHW) if stack is None else stack
    picture = _filled(frame_HW3, topmost(masks_EHW, stack), colours, fill)
    line = line_width(frame_HW3)
    rim = max(1.0, line / 3)
    paths = _visible_paths(masks_EHW, stack, line, line + rim)
    for number in stack:
        _draw_lines(picture, paths[number], PAPER, line + 2 * rim)
    for number in stack:
        _draw_lines(picture, paths[number], colours[number], line)
    return picture


def line_width(frame_HW3: np.ndarray) -> float:
    """Of outlines, in pixels."""
    return max(2.0, min(frame_HW3.shape[:2]) / 180)


def restack(stack: Sequence[int], masks_EHW: np.ndarray) -> list[int]:
    """Order masks by size, the largest first: changes the stack of the frame before only where sizes differ clearly."""
    areas = masks_EHW.sum((1, 2))
    order = list(stack) or sorted(range(len(areas)), key=lambda number: -areas[number])
    for end in range(len(order) - 1, 0, -1):
        for place in range(end):
            lower, upper = order[place], order[place + 1]
            if areas[upper] > _CLEARLY * areas[lower]:
                order[place], order[place + 1] = upper, lower
    return order


def topmost(masks_EHW: np.ndarray, stack: Sequence[int]) -> np.ndarray:
    """(H, W) uint16: 1 + the number of the uppermost mask, or 0."""
    top_HW = np.zeros(masks_EHW.shape[1:], np.uint16)
    for number in stack:
        top_HW[masks_EHW[number]] = number + 1
    return top_HW


def _filled(frame_HW3: np.ndarray, top_HW: np.ndarray, colours: Sequence[Colour], fill: float) -> np.ndarray:
    table = np.array([PAPER, *colours], np.uint8)
    mixed = cv2.addWeighted(frame_HW3, 1 - fill, table.take(top_HW, axis=0), fill, 0)
    return cv2.copyTo(mixed, (top_HW > 0).view(np.uint8), frame_HW3.copy())


def _visible_paths(
    masks_EHW: np.ndarray, stack: Sequence[int], line: float, distance: float
) -> dict[int, list[np.ndarray]]:
    """Pieces of the outlines (n, 2) in pixels, those within ``distance`` of a higher mask left out."""
    margin = round(3 * line)  # masks go on beyond the frame, so that lines do too
    height, width = masks_EHW.shape[1:]
    hidden = np.zeros((height + 2 * margin, width + 2 * margin), np.uint8)
    hidden[[0, -1]] = hidden[:, [0, -1]] = 1
    paths = {}
    for number in reversed(stack):
        mask = np.pad(masks_EHW[number].astype(np.uint8), margin, mode="edge")
        found = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
        outlines = [outline[:, 0] for outline in found if cv2.contourArea(outline) > (3 * line) ** 2]
        paths[number] = [piece - margin for outline in outlines for piece in _pieces(outline, hidden, line)]
        hidden |= mask
        cv2.drawContours(hidden, found, -1, 1, 2 * round(distance) + 1)
    return paths


def _pieces(outline_n2: np.ndarray, hidden: np.ndarray, line: float) -> Iterator[np.ndarray]:
    """The outline without the steps of pixels, cut where it is hidden; specks between cuts are left out too."""
    smooth = gaussian_filter1d(outline_n2.astype(np.float64), line, axis=0, mode="wrap")
    seen = hidden[outline_n2[:, 1], outline_n2[:, 0]] == 0
    if seen.all():
        yield np.concatenate([smooth, smooth[:1]])
        return
    start = int(seen.argmin())
    smooth, seen = np.roll(smooth, -start, axis=0), np.roll(seen, -start)
    cuts = np.flatnonzero(np.diff(seen)) + 1
    for piece, is_seen in zip(np.split(smooth, cuts), np.split(seen, cuts), strict=True):
        if is_seen[0] and len(piece) > 3 * line:
            yield piece


def _draw_lines(picture_HW3: np.ndarray, paths: Sequence[np.ndarray], colour: Colour, width: float) -> None:
    """Draw them onto the picture, smooth and of one width."""
    if not paths:
        return
    points, size = np.concatenate(paths), picture_HW3.shape[1::-1]
    left, top = np.clip(np.floor(points.min(0) - width), 0, size).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0) + width) + 1, 0, size).astype(int)
    part = picture_HW3[top:bottom, left:right]
    if part.size == 0:  # beyond the frame
        return
    fine = np.zeros((part.shape[0] * _FINE, part.shape[1] * _FINE), np.uint8)
    scaled = [((path - (left, top) + 0.5) * _FINE - 0.5).round().astype(np.int32) for path in paths]
    cv2.polylines(fine, scaled, False, 255, round(width * _FINE))
    share = cv2.resize(fine, part.shape[1::-1], interpolation=cv2.INTER_AREA)
    rows, columns = share.nonzero()
    below = part[rows, columns].astype(np.float32)
    weights = share[rows, columns, None].astype(np.float32) / 255
    part[rows, columns] = (below + weights * (np.array(colour, np.float32) - below)).round()


class Painter:
    """Draws the answers of one video, frame after frame, so that neither the stack of masks nor a label jumps.

    Args:
        labels: what stands at the object of each sentence; "": nothing does.
        colours: one per sentence.
        fill: share of the colour in a mask's inside.
    """

    def __init__(self, labels: Sequence[str], colours: Sequence[Colour], fill: float = FILL):
        self.labels, self.colours, self.fill = labels, colours, fill
        self._stack: list[int] = []
        self._tracks: dict[int, _Track] = {}

    def draw(self, frame_HW3: np.ndarray, masks_EHW: np.ndarray, name: str = "") -> np.ndarray:
        """The overlay with a label at each object, "nothing" for empty answers, and the frame's name.

        Args:
            frame_HW3: uint8 RGB.
            masks_EHW: bool.
            name: of the frame.

        Returns:
            (H, W, 3) uint8.
        """
        self._stack = restack(self._stack, masks_EHW)
        picture = overlay(frame_HW3, masks_EHW, self.colours, self._stack, self.fill)
        taken = self._draw_badges(picture, masks_EHW, name)
        self._draw_labels(picture, masks_EHW, taken)
        return picture

    def _draw_badges(self, picture: np.ndarray, masks_EHW: np.ndarray, name: str) -> list[Box]:
        """In the corners: the frame's name, and a badge per empty answer."""
        size = label_size(picture)
        left = top = size // 3
        taken = []
        if name:
            badge = chip(name, PAPER, size)
            taken.append(_paste(picture, badge, picture.shape[1] - badge.shape[1] - left, top))
        for number, (label, mask_HW) in enumerate(zip(self.labels, masks_EHW, strict=True)):
            if not mask_HW.any():
                text, colour = (f"{label} — {NOTHING}", self.colours[number]) if label else (NOTHING, PAPER)
                badge = chip(text, colour, size)
                taken.append(_paste(picture, badge, left, top))
                top += badge.shape[0] + left
                self._tracks.pop(number, None)
        return taken

    def _draw_labels(self, picture: np.ndarray, masks_EHW: np.ndarray, taken: list[Box]) -> None:
        """At the objects, those of later sentences beside or below those that they would cover."""
        top_HW = topmost(masks_EHW, self._stack)
        size = label_size(picture)
        for number, (label, mask_HW) in enumerate(zip(self.labels, masks_EHW, strict=True)):
            if not (label and mask_HW.any()):
                continue
            text = chip(label, self.colours[number], size)
            visible_HW = top_HW == number + 1
            region_HW = visible_HW if 4 * visible_HW.sum() > mask_HW.sum() else mask_HW
            track = _follow(self._tracks.get(number), region_HW, text.shape[1] // 2)
            wanted = _place(text, track, picture.shape, gap=size // 3)
            free = _free(wanted, taken, picture.shape)
            shift = np.subtract(free, wanted)[:2]
            if track.shift is not None:
                shift = track.shift + np.clip(shift - track.shift, -_YIELD * size, _YIELD * size)
            track.shift = shift
            self._tracks[number] = track
            _paste(picture, text, wanted.left + track.shift[0], wanted.top + track.shift[1])
            taken.append(free)


class Box(NamedTuple):
    """Of a label, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass
class _Track:
    """Where a label belongs."""

    part: np.ndarray
    """(2,) centre of the part of the mask that it follows, x and y in pixels."""
    x: float
    y: float
    """Middle of the upper edge of that part, eased over frames."""
    shift: np.ndarray | None = None
    """(2,) way from its place to where it leaves room for others; eased as well."""


def label_size(picture_HW3: np.ndarray) -> int:
    """Of the letters on a picture, in pixels."""
    return max(11, round(min(picture_HW3.shape[:2]) / 36))


def numbers(count: int) -> list[str]:
    """Labels of sentences that stand in a legend; a single one needs none."""
    return [""] if count == 1 else [str(number) for number in range(1, count + 1)]


@lru_cache(256)
def chip(text: str, colour: Colour, size: int) -> np.ndarray:
    """Text on a rounded patch of the colour: (h, w, 4) uint8 RGBA, the letters ``size`` pixels."""
    width, height = round(text_width(text, size) + 0.8 * size), round(1.5 * size)
    is_light = np.dot(colour, (0.299, 0.587, 0.114)) > 130
    image = Image.new("RGB", (width, height), colour)
    draw_text(image, 0.4 * size, 0.1 * size + ascent(size), text, size, INK if is_light else PAPER)
    patch = Image.new("L", (width * _FINE, height * _FINE))
    ImageDraw.Draw(patch).rounded_rectangle((0, 0, patch.width - 1, patch.height - 1), _FINE * size // 3, 255)
    return np.dstack([np.array(image), np.array(patch.resize(image.size, Image.Resampling.BOX))])


def _paste(picture_HW3: np.ndarray, chip_hw4: np.ndarray, left: float, top: float) -> Box:
    """Lay it onto the picture; what reaches over the edge is cut off."""
    x, y = max(0, round(left)), max(0, round(top))
    part = picture_HW3[y : y + chip_hw4.shape[0], x : x + chip_hw4.shape[1]]
    above = chip_hw4[: part.shape[0], : part.shape[1]].astype(np.float32)
    share = above[..., 3:] / 255
    part[:] = (part + share * (above[..., :3] - part)).round()
    return Box(x, y, x + part.shape[1], y + part.shape[0])


def _follow(track: _Track | None, region_HW: np.ndarray, reach: int) -> _Track:
    """Go a step after the part of the region that was followed, or another if it has become less than half as large."""
    x, y, width, height = cv2.boundingRect(region_HW.astype(np.uint8))
    inside = region_HW[y : y + height, x : x + width].astype(np.uint8)
    _, parts, stats, centres = cv2.connectedComponentsWithStats(inside)
    areas, centres = stats[1:, cv2.CC_STAT_AREA], centres[1:]
    large = np.flatnonzero(2 * areas >= areas.max())
    away = -areas[large] if track is None else np.linalg.norm(centres[large] + (x, y) - track.part, axis=1)
    part = large[away.argmin()]
    column = int(centres[part, 0])
    rows = (parts[:, max(0, column - reach) : column + reach + 1] == part + 1).any(1)
    there = _Track(centres[part] + (x, y), x + centres[part, 0], y + float(rows.argmax()))
    if track is not None:
        there.x = track.x + _FOLLOW * (there.x - track.x)
        there.y = track.y + _FOLLOW * (there.y - track.y)
        there.shift = track.shift
    return there


def _place(chip_hw4: np.ndarray, track: _Track, shape: tuple[int, ...], gap: int) -> Box:
    """Above the object, within the picture."""
    height, width = chip_hw4.shape[:2]
    left = float(np.clip(track.x - width / 2, gap, max(gap, shape[1] - width - gap)))
    top = float(np.clip(track.y - height - gap, gap, max(gap, shape[0] - height - gap)))
    return Box(left, top, left + width, top + height)


def _free(box: Box, taken: Sequence[Box], shape: tuple[int, ...]) -> Box:
    """The box moved past all that it overlaps, short ones to the right, long ones down; where it is without room."""
    moved = box
    is_short = box.right - box.left < 2 * (box.bottom - box.top)
    while blocking := [other for other in taken if _overlap(moved, other)]:
        right = max(other.right for other in blocking) + 1 - moved.left if is_short else 0.0
        down = 0.0 if is_short else max(other.bottom for other in blocking) + 1 - moved.top
        moved = Box(moved.left + right, moved.top + down, moved.right + right, moved.bottom + down)
    return moved if moved.right <= shape[1] and moved.bottom <= shape[0] else box


def _overlap(one: Box, other: Box) -> bool:
    across = one.left < other.right and other.left < one.right
    return across and one.top < other.bottom and other.top < one.bottom
