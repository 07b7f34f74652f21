"""Key frames: the frame from which the prediction of a sentence starts, by a model's scores of all frames.

In the format that the authors publish: ``{"<video>_<exp_id>": <name of the frame as a number>}`` (released
inference_iter.py:229-240).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glus.files import read_object, write_text
from glus.inference.job import Identity, Job
from glus.types import Expression, Video

NAMED_IN_MESSAGE = 3
"""Expressions that a message lists."""


def read_key_frames(path: str | Path, expressions: Sequence[Expression]) -> dict[str, int]:
    """The key frames of some expressions; those that the file has for others are left aside.

    Args:
        path: JSON in the published format.
        expressions: each must have an entry.

    Returns:
        ``Expression.name`` -> index of its key frame among ``Expression.frames``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such JSON, lacks an expression, or names a frame that the video does not have.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"inference.key_frames={path}: no such file (scripts/score_frames.py writes one)")
    entries, keys = read_object(Path(path)), _keys(expressions)
    missing = [expression.name for key, expression in keys.items() if key not in entries]
    if missing:
        raise ValueError(
            f"inference.key_frames={path} has no entry for {len(missing)} of {len(keys)} expressions: "
            f"{', '.join(missing[:NAMED_IN_MESSAGE])}{', ...' if len(missing) > NAMED_IN_MESSAGE else ''}; "
            "expected '<video>_<exp_id>' for each (scripts/score_frames.py writes them)"
        )
    return {expression.name: _index(entries[key], expression, path) for key, expression in keys.items()}


def write_key_frames(path: str | Path, key_frames: Iterable[tuple[Expression, int]]) -> None:
    """Write the published format, whole or not at all.

    Args:
        path: the file; replaced if it exists.
        key_frames: expressions, each with the index of its key frame among its frames.

    Raises:
        ValueError: two expressions would have the same entry.
        OSError: it cannot be written.
    """
    pairs = list(key_frames)
    keys = _keys(expression for expression, _ in pairs)
    entries = {key: _number(e.frames[index]) for key, (e, index) in zip(keys, pairs, strict=True)}
    write_text(Path(path), json.dumps(entries, indent=1) + "\n")


def _keys(expressions: Iterable[Expression]) -> dict[str, Expression]:
    """Entry -> expression."""
    keys: dict[str, Expression] = {}
    for expression in expressions:
        key = f"{expression.video}_{expression.exp_id}"
        if keys.setdefault(key, expression) is not expression:
            both = f"{keys[key].name} and {expression.name}"
            raise ValueError(f"{both} would both be {key!r} in a file of key frames, which cannot tell them apart")
    return keys


def _index(wanted: object, expression: Expression, path: str | Path) -> int:
    numbers = [_number(name) for name in expression.frames]
    number = _number(str(wanted))
    if type(wanted) not in (int, str) or number not in numbers:
        first, last = expression.frames[0], expression.frames[-1]
        raise ValueError(
            f"inference.key_frames={path}: {expression.name} has key frame {wanted!r}; expected the number of one of "
            f"its {len(numbers)} frames, {first} to {last}"
        )
    return numbers.index(number)


def _number(name: str) -> int | str:
    """What stands for a frame: its name as a number, or as it is where it is none."""
    return int(name) if name.isdecimal() else name


@dataclass(frozen=True)
class KeyFrames:
    """What the scores of a job have come to."""

    videos: int
    """Of the job."""
    done: int
    """Of these, by whichever process."""
    file: Path
    """Written if all are done."""
    scores: tuple[np.ndarray, ...]
    """(T,) of each expression of the videos that are done."""

    def table(self) -> str:
        """For people."""
        every_score, num = np.concatenate([[], *self.scores]), len(self.scores)
        num_first = sum(not scores.argmax() for scores in self.scores)
        best = [scores.max() for scores in self.scores]
        return (
            f"{self.done} of {self.videos} videos, {num} expressions\n"
            f"mean score of a frame      {every_score.sum() / max(every_score.size, 1):.3f}\n"
            f"mean score of a key frame  {sum(best) / max(num, 1):.3f}\n"
            f"key frame is the first     {num_first} ({num_first / max(num, 1):.1%})"
        )


class FrameScoreJob(Job[KeyFrames]):
    """The scores of all frames of a split, and the key frames that follow from them.

    ``score_frames.json``, ``scores/<video>.json`` and, once every video is scored, ``key_frames.json``.

    Args:
        folder: a new or empty folder, or one that the same model and settings have begun.
        identity: see ``Job``.
        about: see ``Job``.
    """

    def __init__(self, folder: str | Path, identity: Identity, about: dict[str, Any]):
        super().__init__(Path(folder) / "score_frames.json", ("scores", "scored"), identity, about)

    def is_done(self, video: Video) -> bool:
        """Whether a video is scored."""
        return self._path(video).is_file()

    def places(self, video: Video) -> list[str]:
        """See ``Job.places``."""
        return [f"scores/{video[0].video}.json"]

    def write(self, video: Video, scores_ET: np.ndarray) -> None:
        """Keep the scores of a claimed video, whole or not at all.

        Raises:
            OSError: they cannot be written.
        """
        rows = [[round(float(score), 6) for score in row] for row in scores_ET]
        scores = {expression.exp_id: row for expression, row in zip(video, rows, strict=True)}
        write_text(self._path(video), json.dumps({"frames": list(video[0].frames), "scores": scores}) + "\n")

    def conclude(self, videos: Sequence[Video]) -> KeyFrames:
        """The key frame of each expression is the first of its best frames; written once all videos are done.

        Every process does so when it finds nothing more to score, so the last one finds all of them.
        """
        done = [video for video in videos if self.is_done(video)]
        scores = [row for video in done for row in self._read(video)]
        file = self.folder / "key_frames.json"
        if len(done) == len(videos):
            expressions = (expression for video in done for expression in video)
            write_key_frames(file, zip(expressions, (int(row.argmax()) for row in scores), strict=True))
        return KeyFrames(len(videos), len(done), file, tuple(scores))

    def _read(self, video: Video) -> np.ndarray:
        """(E, T)."""
        scores = read_object(self._path(video))["scores"]
        return np.array([scores[expression.exp_id] for expression in video])

    def _path(self, video: Video) -> Path:
        return self.folder / self.places(video)[0]
