"""The contact sheet of Shapes: one row of frames per kind of sentence and structure, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from glus.files import atomic_file
from glus.shapes.scene import KINDS, Scene, Sentence
from glus.shapes.write import scene_of

ROWS = (
    ("appearance", "opposite"),
    ("motion", "opposite"),
    ("global", "leave"),
    ("global", "turn"),
    ("local", "cross"),
    ("multi", "leave"),
    ("absent", "turn"),
)
"""(kind, structure) of the rows; two videos each."""

_SIDE, _GAP, _TITLE = 168, 6, 30
_MARK = (0, 255, 255)
"""Colour of the outline, drawn on a black one: no object has it."""


def draw_contact_sheet(
    seed: int, num_frames: int = 16, size: int = 128, kinds: Sequence[str] = KINDS, num_columns: int = 7
) -> np.ndarray:
    """(height, width, 3) uint8 RGB: rows of ``num_columns`` frames of training videos, under their sentence.

    In each row the objects of one sentence are outlined; a row of an ``absent`` sentence has no outline.
    """
    wanted = [row for row in ROWS if row[0] in kinds for _ in range(2)]
    return np.concatenate([_row(scene, told, num_columns) for scene, told in _find(wanted, seed, num_frames, size)])


def write_contact_sheet(
    path: Path, seed: int, num_frames: int = 16, size: int = 128, kinds: Sequence[str] = KINDS
) -> None:
    """Draw the sheet to a PNG file, which appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    sheet = draw_contact_sheet(seed, num_frames, size, kinds)
    _, data = cv2.imencode(path.suffix, sheet[..., ::-1])
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _find(wanted: Sequence[tuple[str, str]], seed: int, num_frames: int, size: int) -> Iterator[tuple[Scene, Sentence]]:
    """For each wanted (kind, structure) the next training video that has it, with one of its sentences."""
    scenes: list[Scene] = []
    used: set[int] = set()
    for number, (kind, structure) in enumerate(wanted):
        index = 0
        while True:
            if index == len(scenes):
                scenes.append(scene_of(seed, "train", index, num_frames, size))
            if index not in used and scenes[index].structure == structure:
                break
            index += 1
        used.add(index)
        told = [sentence for sentence in scenes[index].sentences if sentence.kind == kind]
        yield scenes[index], told[number % len(told)] if told else scenes[index].sentences[0]


def _row(scene: Scene, sentence: Sentence, num_columns: int) -> np.ndarray:
    picked = np.linspace(0, len(scene.frames_THW3) - 1, num_columns).round().astype(int)
    tiles = [_tile(scene, sentence, int(t)) for t in picked]
    title = np.full((_TITLE, num_columns * (_SIDE + _GAP), 3), 255, np.uint8)
    text = f"{sentence.kind}: {sentence.text}   [frames {', '.join(map(str, picked))}]"
    cv2.putText(title, text, (4, _TITLE - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([title, np.concatenate(tiles, axis=1)])


def _tile(scene: Scene, sentence: Sentence, t: int) -> np.ndarray:
    tile = cv2.resize(scene.frames_THW3[t], (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
    for number in sentence.object_ids:
        mask = scene.masks_OTHW[number, t].astype(np.uint8)
        big = cv2.resize(mask * 255, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR) > 127
        contours, _ = cv2.findContours(big.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for colour, width in (((0, 0, 0), 4), (_MARK, 2)):
            cv2.drawContours(tile, contours, -1, colour, width, cv2.LINE_AA)
    return cv2.copyMakeBorder(tile, 0, _GAP, 0, _GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))
