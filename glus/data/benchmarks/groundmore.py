"""GroundMoRe: questions about motion, whose answers are objects while something happens to them.

``{"videos": {video: {"questions": {id: {"question": ..., "answer": ..., "obj_id": "1, 2", "q_type": "Causal",
"action_start": "01:05", "action_end": "01:10"}}}}}`` in ``trainval_v2.json`` and ``test_v2.json``; frames in
``annotations/<video>/images/frame_000000.jpg`` (6 a second), masks of object ids in ``annotations/<video>/masks/``, no
file where nothing is annotated. A video's id ends in the minutes and seconds of its beginning and end: ``0055_0120``.

Sources: dengandong/GroundMoRe, evaluate_groundmore.py (fields, times, masks, the 20 frames of a test video); file names
of the release as PolyU-ChenLab/UniPixel reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glus.config import DatasetConfig
from glus.data.masks import Size
from glus.data.png_masks import PaletteMasks
from glus.files import field, read_json
from glus.types import Expression, Video

QUESTION_TYPES = ("Causal", "Sequential", "Counterfactual", "Descriptive")
FRAMES_A_SECOND = 6
NUM_TEST_FRAMES = 20
"""A test video is so many of its frames, evenly spread: the authors' program shows and scores no others."""
CLIP = re.compile(r"(\d\d)(\d\d)_\d{4}$")
FRAME_FOLDER, MASK_FOLDER = "images", "masks"
"""Below a video's folder."""


def read_groundmore(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """The group of an expression is its type of question; an annotation id is ``<object>@<first frame>:<last frame>``.

    Raises:
        FileNotFoundError: a video has no folder of frames.
        ValueError: a field is missing or malformed.
    """
    expressions = []
    for video, content in field(read_json(path), "videos", dict, str(path)).items():
        where = f"{path}: videos[{video!r}]"
        frames = _frames(masks / video / FRAME_FOLDER, dataset.split)
        for exp_id, question in field(content, "questions", dict, where).items():
            inside = f"{where}.questions[{exp_id!r}]"
            text, kind = field(question, "question", str, inside), field(question, "q_type", str, inside)
            if kind not in QUESTION_TYPES:
                raise ValueError(f"{inside}: expected {' or '.join(QUESTION_TYPES)} under 'q_type', found {kind!r}")
            objects = _objects(question.get("obj_id"), inside)
            first, last = _interval(video, question, inside)
            annotations = tuple(f"{number}@{first}:{last}" for number in objects)
            expressions.append(Expression(dataset.name, video, exp_id, text, frames, objects, annotations, kind))
    return expressions


class GroundMoreMasks(PaletteMasks):
    """``<folder>/<video>/masks/<frame>.png`` of object ids; outside its interval an object is no answer."""

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``."""
        if expression.annotation_ids:
            self.existing_folder(f"{expression.video}/{MASK_FOLDER}", expression)
        number = _number(expression.frames[frame])
        answers = (annotation.partition("@") for annotation in expression.annotation_ids)
        values = [int(value) for value, _, interval in answers if _is_within(number, interval)]
        if not values or not self._file(expression, frame).is_file():
            return []
        return [np.isin(self._indices(expression, frame, size), values)]

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: a single absent file means an empty mask, an absent folder does not."""
        if expression.annotation_ids:
            self.existing_folder(f"{expression.video}/{MASK_FOLDER}", expression)
        return super().annotated(expression)

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> None:
        """See ``MaskStore.ignore``: there are none."""

    def values(self, video: Video) -> set[int]:
        """See ``MaskStore.values``; objects that no question of the split is about are annotated, too."""
        return set(range(256))

    def _file(self, expression: Expression, frame: int) -> Path:
        return self.path / expression.video / MASK_FOLDER / f"{expression.frames[frame]}.png"


def _frames(folder: Path, split: str) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of frames {folder}; expected annotations/<video>/{FRAME_FOLDER}")
    names = sorted((path.stem for path in folder.glob("*.jpg")), key=_number)
    if not names:
        raise ValueError(f"{folder} has no frames; expected *.jpg")
    if split == "test":
        chosen = np.linspace(0, len(names) - 1, NUM_TEST_FRAMES, dtype=int).tolist()
        names = [names[index] for index in dict.fromkeys(chosen)]
    return tuple(names)


def _number(frame: str) -> int:
    """Of ``frame_000123``."""
    digits = re.search(r"\d+$", frame)
    if digits is None:
        raise ValueError(f"frame {frame!r}: expected a name that ends in its number, as frame_000123")
    return int(digits.group())


def _objects(value: object, where: str) -> tuple[int, ...]:
    parts = str(value).split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{where}: expected numbers with commas between them under 'obj_id', found {value!r}")
    objects = tuple(int(part) for part in parts)
    if 0 in objects:
        raise ValueError(f"{where}: obj_id 0 is the background of the masks; objects are counted from 1")
    return objects


def _interval(video: str, question: object, where: str) -> tuple[int, int]:
    """First and last frame of what is asked about; what ends where the clip begins, or before, has none (-1)."""
    clip = CLIP.search(video)
    if clip is None:
        raise ValueError(f"{where}: expected a video id that ends in <mmss>_<mmss>, the times of its clip")
    begin = 60 * int(clip[1]) + int(clip[2])
    start, end = (_seconds(field(question, key, str, where), where) for key in ("action_start", "action_end"))
    return FRAMES_A_SECOND * (start - begin), FRAMES_A_SECOND * (end - begin) - 1


def _seconds(time: str, where: str) -> int:
    """Of ``mm:ss`` or ``hh:mm:ss``."""
    parts = time.split(":")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{where}: expected a time such as 01:05, found {time!r}")
    return sum(60**power * int(part) for power, part in enumerate(reversed(parts)))


def _is_within(number: int, interval: str) -> bool:
    first, last = interval.split(":")
    return int(first) <= number <= int(last)
