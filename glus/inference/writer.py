"""Predictions on disk: a video's are complete or absent, and a folder of predictions is of one model.

Two forms, both read by ``scripts/score.py``: a folder of PNGs per expression, or a file of run-length codes per video,
which is some hundred times fewer files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from glus.config import PredictionForm
from glus.data.rle import encode_rle
from glus.files import hidden_sibling, naming_write_errors, write_text
from glus.inference.identity import Identity
from glus.inference.job import open_job
from glus.inference.record import Summary, VideoRecord
from glus.types import FrameResult, Video

IDENTITY_FILE = "predict.json"
"""In a folder of predictions: what made them. Its bytes are also what processes lock to share the videos."""
ANSWERS_FILE = "answers.json"
"""In the folder of an expression: one ``Answer`` per frame."""
RECORDS_DIR = ".records"
"""In a folder of predictions: a ``VideoRecord`` per video, written before its masks appear."""
SUMMARY_FILE = "summary.json"
"""In a folder of predictions: the sum of the records."""
MAX_WAITING = 4
"""Results that may wait for the thread that writes them: with 16 masks of 720p each, 60 MB."""

Answer = dict[str, Any]
"""``frame`` (its name), ``area`` (share of the frame that the mask covers), ``score`` (probability of [SEG]) and
``has_seg`` (whether [SEG] was the most likely token)."""


class MaskFolder:
    """The masks of one sentence: ``finish`` makes the folder appear, complete, under its name.

    Until then everything lies in a hidden folder beside it.

    Args:
        path: the folder that is to appear; must not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.answers: list[Answer] = []
        self._temporary = hidden_sibling(path)
        with naming_write_errors(path):
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)

    def write(self, frame: str, mask_HW: np.ndarray, score: float, has_seg: bool) -> None:
        """Save ``<frame>.png``, 8-bit grey, 0 or 255.

        Args:
            frame: name of the frame.
            mask_HW: bool, at the frame's size.
            score: probability of [SEG].
            has_seg: whether the model answered with [SEG].
        """
        # A third of the time that Pillow takes. OpenCV's own writing to disk would not tell why it fails.
        png = cv2.imencode(".png", mask_HW.astype(np.uint8) * 255)[1].tobytes()
        with naming_write_errors(self.path / f"{frame}.png"):
            (self._temporary / f"{frame}.png").write_bytes(png)
        area = round(float(mask_HW.mean()), 6)
        self.answers.append({"frame": frame, "area": area, "score": round(float(score), 6), "has_seg": bool(has_seg)})

    def finish(self) -> None:
        """Add ``ANSWERS_FILE`` and give the folder its name."""
        lines = ",\n".join(json.dumps(answer) for answer in self.answers)
        with naming_write_errors(self.path):
            (self._temporary / ANSWERS_FILE).write_text(f"[\n{lines}\n]\n")
            os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Delete what was not finished."""
        shutil.rmtree(self._temporary, ignore_errors=True)


class _Form(Protocol):
    """One video's predictions on their way to the disk."""

    def begin(self) -> None:
        """Make room for them, and delete what a killed run has left."""

    def write(self, frame: str, result: FrameResult) -> None:
        """Take the masks of one result; called for one after another, by a thread of its own."""

    def finish(self) -> None:
        """Let them appear."""

    def discard(self) -> None:
        """Delete what was written."""


class _PngVideo:
    """``<folder>/<prediction_dir>/<frame>.png``, without the expressions that a killed run had time to finish."""

    def __init__(self, folder: Path, video: Video):
        self._paths = [folder / expression.prediction_dir for expression in video]
        self._folders: dict[int, MaskFolder] = {}

    def begin(self) -> None:
        for row, path in enumerate(self._paths):
            if not path.is_dir():
                self._folders[row] = MaskFolder(path)

    def write(self, frame: str, result: FrameResult) -> None:
        answers = zip(result.rows, result.masks_RHW, result.scores_R, result.has_seg_R, strict=True)
        for row, mask, score, has_seg in answers:
            if row in self._folders:
                self._folders[row].write(frame, mask, score, has_seg)

    def finish(self) -> None:
        for folder in self._folders.values():
            folder.finish()

    def discard(self) -> None:
        for folder in self._folders.values():
            folder.discard()


class _RleVideo:
    """``<folder>/<video>.jsonl``, a line per result."""

    def __init__(self, folder: Path, video: Video):
        self._path = folder / video[0].prediction_file
        self._ids = [expression.exp_id for expression in video]
        self._temporary = hidden_sibling(self._path)

    def begin(self) -> None:
        with naming_write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.write_bytes(b"")

    def write(self, frame: str, result: FrameResult) -> None:
        ids = [self._ids[row] for row in result.rows]
        line = {
            "frame": frame,
            "size": list(result.masks_RHW.shape[1:]),
            "masks": dict(zip(ids, map(encode_rle, result.masks_RHW), strict=True)),
            "scores": dict(zip(ids, (round(float(score), 6) for score in result.scores_R), strict=True)),
            "has_seg": dict(zip(ids, map(bool, result.has_seg_R), strict=True)),
        }
        with naming_write_errors(self._path), self._temporary.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self) -> None:
        with naming_write_errors(self._path):
            os.replace(self._temporary, self._path)

    def discard(self) -> None:
        self._temporary.unlink(missing_ok=True)


class VideoWriter:
    """Takes the results of one video and writes them in a thread of its own, in the order in which they come.

    Args:
        form: where they go.
        video: the expressions.
        pool: of one thread.
    """

    def __init__(self, form: _Form, video: Video, pool: ThreadPoolExecutor):
        self.record = VideoRecord(frames=len(video[0].frames))
        self._form = form
        self._names = video[0].frames
        self._num_expressions = len(video)
        self._pool = pool
        self._waiting: deque[Future[None]] = deque()

    def write(self, result: FrameResult) -> None:
        """Take a result; waits while ``MAX_WAITING`` others are not written yet.

        Raises:
            OSError: one of those before it could not be written.
        """
        self._waiting.append(self._pool.submit(self._write, result))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > MAX_WAITING):
            self._waiting.popleft().result()

    def _write(self, result: FrameResult) -> None:
        start = time.perf_counter()
        self._form.write(self._names[result.frame], result)
        self.record.count(result)
        self.record.add_seconds("write", time.perf_counter() - start)

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            OSError: it could not be.
        """
        while self._waiting:
            self._waiting.popleft().result()
        assert self.record.masks == self._num_expressions * self.record.frames, "not one result per frame"

    def discard(self) -> None:
        """Delete everything."""
        wait(self._waiting)
        self._form.discard()


class PredictionWriter:
    """The folder of one model's predictions on one split, shared by any number of processes.

    Args:
        folder: a new or empty folder, or one that the same model and settings have begun.
        identity: everything that decides the masks, see ``prediction_identity``.
        about: further information that is kept beside the identity (command, commit, versions).
        form: PNGs or run-length codes.

    Raises:
        ValueError: the folder holds something else, or predictions of another identity or form.
        OSError: it cannot be written or locked.
    """

    def __init__(self, folder: str | Path, identity: Identity, about: dict[str, Any], form: PredictionForm):
        self.folder = Path(folder)
        self._form = form
        self._pool = ThreadPoolExecutor(1, "writer")
        self._claims = open_job(self.folder / IDENTITY_FILE, "predictions", {**identity, "form": form.value}, about)

    def is_done(self, video: Video) -> bool:
        """Whether all masks of a video are there."""
        if self._form is PredictionForm.rle:
            return (self.folder / video[0].prediction_file).is_file()
        return all((self.folder / expression.prediction_dir).is_dir() for expression in video)

    @contextmanager
    def claim(self, number: int, video: Video) -> Iterator[bool]:
        """Whether this process is to predict a video, which no other will while the block lasts.

        Args:
            number: of the video in the split; every process must count alike.
            video: its expressions. False where it is done or another process is at it.
        """
        with self._claims.claimed(number) as is_mine:
            yield is_mine and not self.is_done(video)

    @contextmanager
    def open(self, video: Video) -> Iterator[VideoWriter]:
        """Begin a claimed video; what a killed run left of it is deleted. An error in the block deletes all of it.

        Its expressions must be predicted together, also where a killed run has finished some of them: in a batch of
        another size, a pixel on the threshold may fall to the other side.
        """
        form = _RleVideo(self.folder, video) if self._form is PredictionForm.rle else _PngVideo(self.folder, video)
        writer = VideoWriter(form, video, self._pool)
        start = time.perf_counter()
        try:
            form.begin()
            yield writer
            writer.wait()
            writer.record.elapsed = time.perf_counter() - start
            write_text(self._record_path(video), writer.record.to_json())
            form.finish()
        except BaseException:
            writer.discard()
            raise

    def summarize(self, videos: Sequence[Video]) -> Summary:
        """Of all videos that are done, by whichever process; also written to ``SUMMARY_FILE``."""
        with self._claims.alone():
            paths = [self._record_path(video) for video in videos if self.is_done(video)]
            summary = Summary.of([path.read_text() for path in paths], len(videos))
            write_text(self.folder / SUMMARY_FILE, summary.to_json())
        return summary

    def _record_path(self, video: Video) -> Path:
        return self.folder / RECORDS_DIR / f"{video[0].video}.json"
