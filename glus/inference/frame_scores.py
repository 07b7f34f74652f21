"""Scores of frames on disk, a file per video, and the key frames that follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glus.files import write_text
from glus.inference.identity import Identity
from glus.inference.job import open_job
from glus.inference.key_frames import write_key_frames
from glus.types import Video

IDENTITY_FILE = "score_frames.json"
"""In a folder of scores: what made them. Its bytes are also what processes lock to share the videos."""
SCORES_DIR = "scores"
KEY_FRAMES_FILE = "key_frames.json"
"""In a folder of scores: the published format; there once every video is scored."""


@dataclass(frozen=True)
class KeyFrames:
    """What the scores of a job have come to."""

    videos: int
    """Of the job."""
    done: int
    """Of these, by whichever process."""
    file: Path
    """Written if all are done."""
    expressions: int
    """Of the videos that are done."""
    at_first: int
    """Expressions whose key frame is the first frame, as without key frames."""
    mean_score: float
    """Over all expressions and frames."""
    mean_key_score: float
    """Over key frames."""

    def table(self) -> str:
        """For people."""
        share = self.at_first / max(self.expressions, 1)
        return "\n".join(
            [
                f"{self.done} of {self.videos} videos, {self.expressions} expressions",
                f"mean score of a frame      {self.mean_score:.3f}",
                f"mean score of a key frame  {self.mean_key_score:.3f}",
                f"key frame is the first     {self.at_first} ({share:.1%})",
            ]
        )


class FrameScores:
    """The folder of one model's frame scores on one split, shared by any number of processes.

    Args:
        folder: a new or empty folder, or one that the same model and settings have begun.
        identity: everything that decides the scores, see ``prediction_identity``.
        about: further information that is kept beside the identity.

    Raises:
        ValueError: the folder holds something else, or scores of another identity.
        OSError: it cannot be written or locked.
    """

    def __init__(self, folder: str | Path, identity: Identity, about: dict[str, Any]):
        self.folder = Path(folder)
        self._claims = open_job(self.folder / IDENTITY_FILE, "scores", identity, about)

    def is_done(self, video: Video) -> bool:
        """Whether a video is scored."""
        return self._path(video).is_file()

    @contextmanager
    def claim(self, number: int, video: Video) -> Iterator[bool]:
        """Whether this process is to score a video, see ``PredictionWriter.claim``."""
        with self._claims.claimed(number) as is_mine:
            yield is_mine and not self.is_done(video)

    def write(self, video: Video, scores_ET: np.ndarray) -> None:
        """Keep the scores of a claimed video, whole or not at all.

        Raises:
            OSError: they cannot be written.
        """
        rows = [[round(float(score), 6) for score in row] for row in scores_ET]
        scores = {expression.exp_id: row for expression, row in zip(video, rows, strict=True)}
        write_text(self._path(video), json.dumps({"frames": list(video[0].frames), "scores": scores}) + "\n")

    def read(self, video: Video) -> np.ndarray:
        """The scores (E, T) of a video that is done."""
        scores = json.loads(self._path(video).read_text(encoding="utf-8"))["scores"]
        return np.array([scores[expression.exp_id] for expression in video])

    def choose(self, videos: Sequence[Video]) -> KeyFrames:
        """The key frame of each expression is the first of its best frames; written once all videos are done.

        Every process does so when it finds nothing more to score, so the last one finds all of them.
        """
        scores = [(video, self.read(video)) for video in videos if self.is_done(video)]
        rows = [(e, row) for video, scores_ET in scores for e, row in zip(video, scores_ET, strict=True)]
        chosen = [(expression, int(row.argmax())) for expression, row in rows]
        file = self.folder / KEY_FRAMES_FILE
        if len(scores) == len(videos):
            with self._claims.alone():
                write_key_frames(file, chosen)
        return KeyFrames(
            videos=len(videos),
            done=len(scores),
            file=file,
            expressions=len(rows),
            at_first=sum(index == 0 for _, index in chosen),
            mean_score=float(np.mean(np.concatenate([row for _, row in rows]))) if rows else 0.0,
            mean_key_score=float(np.mean([row.max() for _, row in rows])) if rows else 0.0,
        )

    def _path(self, video: Video) -> Path:
        return self.folder / SCORES_DIR / f"{video[0].video}.json"
