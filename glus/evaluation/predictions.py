"""Reading predictions, in the two forms that they may have, and naming every one that cannot be used.

- PNG: ``<folder>/<expression.prediction_dir>/<frame>.png``, any non-zero pixel is foreground;
- RLE: ``<folder>/<video>.jsonl``, lines ``{"frame": name, "size": [H, W], "masks": {exp_id: COCO compressed counts}}``
  in any order; a frame may be spread over several lines. Other keys of a line are not looked at.

A mask means the same in both, so scores do not depend on the form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glus.data.rle import Size, decode_rle
from glus.evaluation.packed import BitMasks
from glus.evaluation.png import UnusablePrediction, read_png, wrong_size
from glus.files import distinct_keys
from glus.types import Expression, Video


class VideoPredictions(Protocol):
    """The predictions for one video."""

    problems: tuple[str, ...]
    """What is wrong with the form as a whole (RLE: lines that cannot be read)."""
    warnings: tuple[str, ...]
    """What belongs to no expression or no frame of the video (RLE; for PNGs see ``unexpected_files``)."""

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> tuple[BitMasks, dict[int, str]]:
        """The masks of some frames (indices), empty where one is missing, does not decode, or is not of ``size``
        (H, W); and for each of those its index with a line that says what is wrong."""

    def no_answer(self, expression: Expression) -> str | None:
        """A line that says so if there is nothing at all for this expression."""


def check_predictions_dir(predictions_dir: str | Path) -> None:
    """Raise FileNotFoundError unless the folder exists: a misspelt path is no prediction that scores 0."""
    if not Path(predictions_dir).is_dir():
        raise FileNotFoundError(
            f"no folder of predictions {predictions_dir}; expected <video>/<exp_id>/<frame>.png or <video>.jsonl in it"
        )


def open_predictions(folder: Path, video: Video) -> VideoPredictions:
    """The predictions of one video, in the form they are found in; PNG where there are none.

    Raises:
        ValueError: both forms are there.
    """
    rle = folder / video[0].prediction_file
    if not rle.is_file():
        return PngPredictions(folder)
    for expression in video:
        if (folder / expression.prediction_dir).is_dir():
            raise ValueError(
                f"{expression.name} is predicted twice: {rle} and {folder / expression.prediction_dir}; delete one"
            )
    return RlePredictions(rle, video)


def read_complete(
    predictions: VideoPredictions, expression: Expression, frames: Sequence[int], size: Size, hint: str
) -> BitMasks:
    """The predicted masks of some frames; ValueError, with a hint, if one is missing or unusable."""
    masks, unusable = predictions.read(expression, frames, size)
    if unusable:
        raise ValueError(f"{next(iter(unusable.values()))} ({hint})")
    return masks


class PngPredictions:
    """One PNG for each expression and frame."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> tuple[BitMasks, dict[int, str]]:
        """See ``VideoPredictions``."""
        folder = self.folder / expression.prediction_dir
        masks_FHW = np.zeros((len(frames), *size), dtype=bool)
        unusable = {}
        for row, frame in enumerate(frames):
            try:
                masks_FHW[row] = read_png(folder / f"{expression.frames[frame]}.png", size)
            except UnusablePrediction as error:
                unusable[frame] = _about(expression, frame, error)
        return BitMasks.from_dense(masks_FHW), unusable

    def no_answer(self, expression: Expression) -> str | None:
        """See ``VideoPredictions``."""
        folder = self.folder / expression.prediction_dir
        return None if folder.is_dir() else f"no folder {folder} and no {self.folder / expression.prediction_file}"


class RlePredictions:
    """The run-length codes of one video, held compressed, about 1 kB a mask.

    Args:
        path: the file.
        video: the expressions that are expected in it.

    A line that cannot be read and a mask that is given twice are problems; masks of unknown expressions or frames are
    warnings.
    """

    def __init__(self, path: Path, video: Video):
        self.path = path
        self._codes: dict[tuple[str, str], list[tuple[int, str, Size]]] = {}
        problems = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line:
                continue
            try:
                self._add(number, line)
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
        self.problems = tuple(problems)
        self._answered = {exp_id for exp_id, _ in self._codes}
        self.warnings = tuple(self._unexpected(video))

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> tuple[BitMasks, dict[int, str]]:
        """See ``VideoPredictions``."""
        codes: list[list[str]] = []
        unusable = {}
        for frame in frames:
            try:
                codes.append([self._code(expression, expression.frames[frame], size)])
            except UnusablePrediction as error:
                unusable[frame] = _about(expression, frame, error)
                codes.append([])
        try:
            return BitMasks.from_rle(codes, size), unusable
        except ValueError:
            unusable |= self._drop_damaged(codes, expression, frames, size)
            return BitMasks.from_rle(codes, size), unusable

    def _drop_damaged(
        self, codes: list[list[str]], expression: Expression, frames: Sequence[int], size: Size
    ) -> dict[int, str]:
        """Take the codes that do not decode out of ``codes``; a line for each, by frame."""
        damaged = {}
        for row, frame in enumerate(frames):
            try:
                for counts in codes[row]:
                    decode_rle(counts, size)
            except ValueError as error:
                codes[row] = []
                damaged[frame] = _about(expression, frame, f"its mask in {self.path} does not decode: {error}")
        return damaged

    def _code(self, expression: Expression, frame: str, size: Size) -> str:
        """The code of a mask; UnusablePrediction unless there is exactly one, of the right size."""
        found = self._codes.get((expression.exp_id, frame), [])
        if not found:
            raise UnusablePrediction(f"{self.path} has no mask of it")
        if len(found) > 1:
            lines = " and ".join(str(number) for number, *_ in found)
            raise UnusablePrediction(f"{self.path} has it more than once, in lines {lines}")
        number, counts, found_size = found[0]
        if found_size != tuple(size):
            raise UnusablePrediction(f"its mask in {self.path}, line {number}, is {wrong_size(found_size, size)}")
        return counts

    def no_answer(self, expression: Expression) -> str | None:
        """See ``VideoPredictions``."""
        return None if expression.exp_id in self._answered else f"{self.path} has no mask of it"

    def _add(self, number: int, line: bytes) -> None:
        try:
            entry = json.loads(line, object_pairs_hook=distinct_keys)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError("is not complete JSON (damaged or cut short)") from error
        frame, size, masks = _fields(entry)
        for exp_id, counts in masks.items():
            self._codes.setdefault((exp_id, frame), []).append((number, counts, size))

    def _unexpected(self, video: Video) -> Iterator[str]:
        frames = {expression.exp_id: set(expression.frames) for expression in video}
        for exp_id in sorted(self._answered - frames.keys()):
            yield f"{self.path}: masks of no expression {exp_id!r}"
        for exp_id, expected in frames.items():
            extra = sorted(frame for found, frame in self._codes if found == exp_id and frame not in expected)
            if extra:
                yield f"{self.path}: {len(extra)} masks of expression {exp_id!r} in no frame, the first {extra[0]!r}"


def unexpected_files(folder: Path, videos: Iterable[Video]) -> list[str]:
    """Folders with PNGs of no expression, PNGs of no frame, and ``.jsonl`` files of no video, as sorted lines."""
    videos = list(videos)
    expected = {folder / expression.prediction_dir: expression for video in videos for expression in video}
    rle_files = {folder / video[0].prediction_file for video in videos}
    lines = []
    for name, subfolders, files in os.walk(folder):
        subfolders.sort()
        pngs = {file.removesuffix(".png") for file in files if file.endswith(".png")}
        expression = expected.get(Path(name))
        if expression is None and pngs:
            lines.append(f"{name}: {len(pngs)} PNGs of no expression")
        elif expression is not None and (extra := sorted(pngs.difference(expression.frames))):
            lines.append(f"{name}: {len(extra)} PNGs of no frame, the first {extra[0]}.png")
        jsonl = (Path(name) / file for file in sorted(files) if file.endswith(".jsonl"))
        lines += [f"{path}: masks of no video" for path in jsonl if path not in rle_files]
    return lines


def _about(expression: Expression, frame: int, error: object) -> str:
    return f"{expression.name}, frame {expression.frames[frame]}: {error}"


def _fields(entry: Any) -> tuple[str, Size, dict[str, str]]:
    """Frame, size and masks of a line; ValueError if it is not as expected."""
    try:
        frame, (height, width), masks = entry["frame"], entry["size"], entry["masks"]
        is_valid = all(isinstance(value, str) for value in (frame, *masks.values()))
        if is_valid and isinstance(height, int) and isinstance(width, int):
            return frame, (height, width), masks
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise ValueError(f"expected {{frame: name, size: [H, W], masks: {{exp_id: counts}}}}, found {entry!r:.80}")
