"""A split as a job that processes share: a folder marked with what decides its contents, and videos claimed one by one.

Processes need not meet: whoever locks a video's byte of the file that marks the folder has the video. POSIX record
locks belong to a process and die with it, also under ``kill -9`` or when its machine goes down, so there are no stale
claims to detect; they need no launcher, work between machines wherever the file system has them (local disks, NFS), and
let a run be continued, or joined while it is going on, by any number of processes. A share fixed in advance would need
none of this, but leaves fast processes idle and a continued run unbalanced.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.progress import BarColumn, Progress

from glus import distributed
from glus.config import (
    DatasetConfig,
    ModelFolderConfig,
    PredictConfig,
    PredictionForm,
    ScoreFramesConfig,
    leaves,
    plain_config,
)
from glus.console import console
from glus.data.benchmarks.index import require_texts
from glus.data.predictions import is_predicted, write_predictions
from glus.files import naming_write_errors, read_object, require_room, write_text
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.video_run import STAGES
from glus.types import Expression, FrameResult, Video

log = logging.getLogger(__name__)

GATE = 0
"""The byte that is locked for moments in which only one process may do something; video n (from 1 on) has byte n."""
MAX_WAITING = 4
"""Results that may wait for the thread that writes them: with 16 masks of 720p each, 60 MB."""
SECONDS_BETWEEN_LINES = 30.0
"""Of progress, where there is no terminal."""
SECONDS_BETWEEN_LOOKS = 5.0
"""At the folder, for what other processes have finished."""

COST_FILE = "cost.json"
OWN_NAMES = {
    *("predict.json", COST_FILE, "summary.json", ".records"),
    *("report.json", "per_expression.csv", "per_object.csv"),
}
"""What predicting and scoring write into the folder of predictions, where videos have folders, too, and
``summary.json``, as the cost was called before 2026-12."""

Identity = dict[str, Any]
"""Nested JSON values; two equal identities give equal results."""
Conclusion = TypeVar("Conclusion")
"""What the results of a job come to: ``Summary``, ``KeyFrames``."""


class Job(ABC, Generic[Conclusion]):
    """The folder of one model's results on one split, shared by any number of processes.

    A process must not open the marking file anywhere else meanwhile: closing it would give up all of its locks.

    Args:
        mark: the file that marks the folder, a new or empty one, or one that was begun with the same identity. It
            holds the identity, and its bytes are what processes lock.
        results: what they are, in the plural, and what is done to a video, in the past, for messages.
        identity: everything that decides them, see ``prediction_identity``.
        about: further information that is kept beside the identity (command, commit, versions).

    Raises:
        ValueError: the folder holds something else, or results of another identity.
        OSError: it cannot be written or locked.
    """

    def __init__(self, mark: Path, results: tuple[str, str], identity: Identity, about: dict[str, Any]):
        self.folder, self._mark = mark.parent, mark
        self._results, self._done_to = results
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output={self.folder} is a file; expected the name of a folder for {self._results}")
        with naming_write_errors(mark):
            Path(os.path.realpath(self.folder)).mkdir(parents=True, exist_ok=True)  # a link may point to nothing yet
            entries = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
            if entries and not mark.is_file():  # which other processes make before anything else
                raise ValueError(
                    f"output={self.folder} holds {entries[0]!r} but no {mark.name}, so it is no folder of "
                    f"{self._results} that could be continued; choose a new or empty folder"
                )
            self._file = mark.open("a+", encoding="utf-8")
        with self.locked(GATE, wait=True):
            self._check_or_write_identity(identity, about)

    @abstractmethod
    def is_done(self, video: Video) -> bool:
        """Whether the results of a video are there."""

    @abstractmethod
    def places(self, video: Video) -> list[str]:
        """Where the results of a video lie, below the folder."""

    @abstractmethod
    def conclude(self, videos: Sequence[Video]) -> Conclusion:
        """What the results of those of the job's videos that are done come to; one process at a time asks."""

    def run(self, videos: Sequence[Video], process: Callable[[Video], Iterable[int]]) -> Conclusion:
        """Process what is neither done nor claimed by another process, the most expensive first: it balances the load.

        Args:
            videos: the whole job; every process must have the same.
            process: does it; yields how many masks each step has added.

        Raises:
            ValueError: videos cannot be read; the others have been processed nevertheless. Or, before the first one,
                names collide.
            OSError: results cannot be written.
        """
        self._check_names(videos)
        problems = []
        progress = JobProgress(videos, self.is_done)
        by_cost = sorted(enumerate(videos, start=1), key=lambda item: _num_masks(item[1]), reverse=True)
        with progress.bar:
            for byte, video in by_cost:
                with self.locked(byte) as is_mine:
                    if not is_mine or self.is_done(video):
                        continue
                    try:
                        for masks in process(video):
                            progress.advance(masks, len(video))
                        progress.finish(video)
                    except (ValueError, FileNotFoundError) as error:
                        log.error("video %s: %s", video[0].video, error)
                        problems.append(f"{video[0].video}: {error}")
                    except OSError as error:
                        raise OSError(f"{error}; what is finished is kept") from error
        with self.locked(GATE, wait=True):
            conclusion = self.conclude(videos)
        if problems:
            raise ValueError(
                f"{len(problems)} of {len(videos)} videos could not be {self._done_to} "
                f"({sum(map(self.is_done, videos))} are done); repair them and run the same command again:\n"
                + "\n".join(problems)
            )
        return conclusion

    @contextmanager
    def locked(self, byte: int, wait: bool = False) -> Iterator[bool]:
        """Whether this process has a byte of the marking file; if so, nobody else has it until the block ends.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
            is_mine = True
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
            is_mine = False
        except OSError as error:
            raise OSError(
                f"{self._mark} cannot be locked ({error.strerror}), which is how processes share the videos; choose "
                "output on a file system with POSIX locks (a local disk, NFS, Lustre mounted with flock)"
            ) from error
        try:
            yield is_mine
        finally:
            if is_mine:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    def _check_names(self, videos: Sequence[Video]) -> None:
        """Raise ValueError where results would get the name of others, or of a file of ours, also but for its case."""
        is_case_blind = self._mark.with_name(self._mark.name.upper()).exists()
        owners: dict[str, str] = {}
        for name, place in ((video[0].video, place) for video in videos for place in self.places(video)):
            key = place.casefold() if is_case_blind else place
            is_own = place.split("/")[0].casefold() in OWN_NAMES
            if is_own or key in owners:
                other = "a file of this program" if is_own else f"video {owners[key]!r}"
                raise ValueError(
                    f"video {name!r} and {other} would share {self.folder / place}: give the video another id"
                    + (", or choose a disk that tells upper from lower case" if is_case_blind else "")
                )
            owners[key] = name

    def _check_or_write_identity(self, identity: Identity, about: dict[str, Any]) -> None:
        self._file.seek(0)
        try:
            old, new = leaves(json.load(self._file)["identity"]), leaves(identity)
        except json.JSONDecodeError:  # new, or its writer was killed before it could write anything else
            with naming_write_errors(self._mark):
                self._file.truncate(0)
                self._file.write(json.dumps({"identity": identity, **about}, indent=2) + "\n")
                self._file.flush()
            return
        different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if different:
            lines = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} now" for key in different)
            raise ValueError(
                f"output={self.folder} holds {self._results} made otherwise ({lines}); "
                "choose another output, or delete this one to begin anew"
            )


def _num_masks(video: Video) -> int:
    return len(video) * len(video[0].frames)


class JobProgress:
    """How far a job is: a bar in a terminal, a line now and then in a log file, of the first process alone.

    Counts the masks of a job, also those of other processes, and this process's frames per second.

    Args:
        videos: the whole job.
        is_done: whether a video is.
    """

    def __init__(self, videos: Sequence[Video], is_done: Callable[[Video], bool]):
        self._is_done = is_done
        self._pending = [video for video in videos if not is_done(video)]
        self._num_videos, self._num_masks = len(self._pending), sum(map(_num_masks, self._pending))
        self._masks, self._frames = 0, 0.0  # masks by whichever process, frames by this one
        self._start = self._last_look = self._last_line = time.perf_counter()
        is_shown = distributed.rank() == 0
        self._is_logged = is_shown and not console().is_terminal
        columns = BarColumn(), "{task.description}"
        self.bar = Progress(*columns, console=console(), disable=not is_shown or self._is_logged)
        self._task = self.bar.add_task("", total=self._num_masks)

    def advance(self, masks: int, of_masks: int) -> None:
        """``masks`` more of the ``of_masks`` that this frame has."""
        self._masks += masks
        self._frames += masks / of_masks
        self._show()

    def finish(self, video: Video) -> None:
        """A video is done; now and then, see what others have done meanwhile."""
        self._pending.remove(video)
        if time.perf_counter() - self._last_look > SECONDS_BETWEEN_LOOKS:
            self._last_look = time.perf_counter()
            self._pending = [other for other in self._pending if not self._is_done(other)]
        self._masks = self._num_masks - sum(map(_num_masks, self._pending))
        self._show(is_due=not self._pending)

    def _show(self, is_due: bool = False) -> None:
        """``3/50 videos, 120/9000 masks, 2.1 frames/s, 0:12:30 left``; the time left counts on all processes."""
        now, done = time.perf_counter(), self._num_videos - len(self._pending)
        elapsed = max(now - self._start, 1e-9)
        left = timedelta(seconds=round(elapsed * (self._num_masks - self._masks) / max(self._masks, 1)))
        line = (
            f"{done}/{self._num_videos} videos, {self._masks}/{self._num_masks} masks, "
            f"{self._frames / elapsed:.1f} frames/s, {left} left"
        )
        self.bar.update(self._task, completed=self._masks, description=line)
        if self._is_logged and (is_due or now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            log.info("%s", line)


@dataclass(frozen=True)
class Summary:
    """What predicting the videos of a job that are done has cost and given, whichever process did it."""

    videos: int
    """Of the job."""
    done: int
    """Of these."""
    frames: int = 0
    masks: int = 0
    """Pairs of expression and frame."""
    without_seg: int = 0
    """Masks where the model did not answer with [SEG]: empty unless ``force_seg``."""
    empty_masks: int = 0
    elapsed: float = 0.0
    """Seconds from the first frame of a video to its last mask on disk; of two processes that work for a second each,
    two."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage. Decoding and writing have threads of their own, so that the sum may exceed ``elapsed``."""

    def table(self) -> str:
        """For people: time per stage, and what came out."""
        frames, masks, elapsed = max(self.frames, 1), max(self.masks, 1), max(self.elapsed, 1e-9)
        lines = [f"{'stage':8} {'seconds':>9} {'ms/frame':>9} {'share':>6}"]
        for stage, seconds in (*self.seconds.items(), ("elapsed", self.elapsed)):
            lines.append(f"{stage:8} {seconds:9.1f} {1000 * seconds / frames:9.1f} {seconds / elapsed:6.0%}")
        lines.append(
            f"{self.done} of {self.videos} videos, {self.frames} frames, {self.masks} masks: "
            f"{self.without_seg} without [SEG] ({self.without_seg / masks:.1%}), "
            f"{self.empty_masks} empty ({self.empty_masks / masks:.1%})"
        )
        return "\n".join(lines)


class PredictionJob(Job[Summary]):
    """The masks of a split: ``predict.json``, the masks of each video, and what they have cost.

    ``.records/<video>.json``, written before a video's masks appear, has the fields of ``Summary`` for that video;
    ``cost.json`` their sum.

    Args:
        folder: a new or empty folder, or one that the same model and settings have begun.
        identity: see ``Job``.
        about: see ``Job``.
        form: PNGs or run-length codes.
    """

    def __init__(self, folder: str | Path, identity: Identity, about: dict[str, Any], form: PredictionForm):
        mark, identity = Path(folder) / "predict.json", {**identity, "form": form.value}
        super().__init__(mark, ("predictions", "predicted"), identity, about)
        self._form = form

    def is_done(self, video: Video) -> bool:
        """Whether all masks of a video are there."""
        return is_predicted(self.folder, video, self._form)

    def places(self, video: Video) -> list[str]:
        """See ``Job.places``."""
        if self._form is PredictionForm.rle:
            return [video[0].prediction_file]
        return [expression.prediction_dir for expression in video]

    def run(self, videos: Sequence[Video], process: Callable[[Video], Iterable[int]]) -> Summary:
        """See ``Job.run``; OSError also where the disk is too small for what is to be predicted."""
        if self._form is PredictionForm.png:
            require_room(self.folder, sum(_num_masks(video) for video in videos if not self.is_done(video)))
        return super().run(videos, process)

    def write(self, video: Video, results: Iterable[FrameResult], clock: Mapping[str, float]) -> Iterator[int]:
        """Write the masks of a claimed video, in a thread of its own while the next are computed.

        They appear together at the end; an error deletes them.

        Args:
            video: its expressions.
            results: exactly one answer to each in each frame.
            clock: seconds of each stage so far, to which computing the results adds.

        Yields:
            How many masks each result has.

        Raises:
            OSError: they cannot be written.
        """
        start, names, before = time.perf_counter(), video[0].frames, dict(clock)
        counts = Counter(frames=len(names), masks=0, without_seg=0, empty_masks=0)
        seconds = {"write": 0.0}

        def write(result: FrameResult) -> None:
            began = time.perf_counter()
            write_masks(names[result.frame], result)
            num_empty = int((~result.masks_RHW.any(axis=(1, 2))).sum())
            counts.update(masks=len(result.rows), without_seg=int((~result.has_seg_R).sum()), empty_masks=num_empty)
            seconds["write"] += time.perf_counter() - began

        with write_predictions(self.folder, video, self._form) as write_masks:
            with ThreadPoolExecutor(1, "writer") as pool:
                waiting: deque[Future[None]] = deque()
                for result in results:
                    waiting.append(pool.submit(write, result))
                    while waiting and (waiting[0].done() or len(waiting) > MAX_WAITING):
                        waiting.popleft().result()
                    yield len(result.rows)
                for future in waiting:
                    future.result()
            assert counts["masks"] == _num_masks(video), "not one result per frame"
            seconds |= {stage: total - before.get(stage, 0.0) for stage, total in clock.items()}
            record = {**counts, "elapsed": time.perf_counter() - start, "seconds": seconds}
            write_text(self._record_path(video), json.dumps(record) + "\n")

    def conclude(self, videos: Sequence[Video]) -> Summary:
        """Also written to ``cost.json``, without videos whose record was lost, as in a copy without hidden files."""
        paths = [self._record_path(video) for video in videos if self.is_done(video)]
        records = [read_object(path) for path in paths if path.is_file()]
        if len(records) < len(paths):
            log.warning(
                "%s leaves out %d of %d videos: what they have cost is in %s no more",
                self.folder / COST_FILE, len(paths) - len(records), len(paths), self.folder / ".records",
            )  # fmt: skip
        totals: Any = Counter()
        seconds: Any = Counter(dict.fromkeys((*STAGES, "write"), 0.0))
        for record in records:
            seconds.update(record.pop("seconds"))
            totals.update(record)
        summary = Summary(len(videos), len(paths), **totals, seconds=dict(seconds))
        file, text = self.folder / COST_FILE, json.dumps(asdict(summary), indent=2) + "\n"
        if not file.is_file() or file.read_text() != text:  # its date says when something was last predicted
            write_text(file, text)
        return summary

    def _record_path(self, video: Video) -> Path:
        return self.folder / ".records" / f"{video[0].video}.json"


def load_for_split(
    config: PredictConfig | ScoreFramesConfig, expressions: Sequence[Expression], key_frames: str | None = None
) -> tuple[VideoPredictor, Identity]:
    """The model, which can read every sentence of the split, and what decides its answers.

    Args:
        config: of the run.
        expressions: all of the split.
        key_frames: the file of key frames, if the answers start from them.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: weights, config or settings do not fit, or a sentence is too long, or no text.
    """
    require_texts(expressions)
    predictor, model = load_predictor(config.weights, config.inference, config.allow_cpu)
    check_lengths(predictor, ((expression.name, expression.text) for expression in expressions))
    identity = prediction_identity(config.dataset, expressions, model.vocabulary.folder, model.config, key_frames)
    return predictor, identity


def prediction_identity(
    dataset: DatasetConfig,
    expressions: Iterable[Expression],
    model_folder: Path,
    settings: ModelFolderConfig,
    key_frames: str | Path | None = None,
) -> Identity:
    """What decides the masks.

    Args:
        dataset: its name and split; where it lies does not matter.
        expressions: all of the split; their hash tells a generated benchmark from one generated anew.
        model_folder: the contents of its weights and vocabulary count, not its place.
        settings: the model folder's, with this run's overrides and precision; not what decides memory and speed alone,
            so that a run that needed too much memory can be continued with less.
        key_frames: the file of key frames, whose contents count.
    """
    values = plain_config(settings)
    for irrelevant in ("tokenizer", "lora_dropout"):
        del values["model"]["llm"][irrelevant]
    for irrelevant in ("chunk_frames", "token_budget", "memory_gb"):
        del values["inference"][irrelevant]
    if not values["inference"]["existence_threshold"]:  # so that predictions of before there was one can be continued
        del values["inference"]["existence_threshold"]
    names = ("model*.safetensors", "trained.safetensors", "tokenizer.model", "added_tokens.json", "tokenizer.json")
    files = sorted(file for name in names for file in model_folder.glob(name))  # without a checkpoint's optimizer
    with ThreadPoolExecutor() as pool:  # files of many gigabytes, side by side
        digests = dict(zip((file.name for file in files), pool.map(_sha256, files), strict=True))
    sentences = "\n".join(json.dumps([e.video, e.exp_id, e.text, e.frames]) for e in expressions)
    expressions_hash = hashlib.sha256(sentences.encode()).hexdigest()
    return {
        "dataset": {"name": dataset.name, "split": dataset.split, "expressions": expressions_hash},
        "weights": digests,
        "key_frames": _sha256(Path(key_frames)) if key_frames else None,
        **values,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_lengths(predictor: VideoPredictor, texts: Iterable[tuple[str, str]]) -> None:
    """Stop at a sentence whose longest prompt does not fit the LLM, before any frame is read.

    Args:
        predictor: its LLM's ``max_position_embeddings`` is the limit.
        texts: how messages call each sentence, and the sentence.

    Raises:
        ValueError: a prompt is too long; the message gives its length and the limit in tokens.
    """
    limit = predictor.glus.mllm.decoder.max_length
    num_context, num_query = predictor.frames.num_context, predictor.frames.num_query
    has_space = predictor.inference.trailing_space

    def length(text: str) -> int:
        return len(predictor.chat.window(text, num_context, num_query, has_space).input_ids)

    rest = length("")
    for name, text in texts:
        tokens = length(text)
        if tokens > limit:
            raise ValueError(
                f"{name}: a sentence of {len(text)} characters needs a prompt of {tokens} tokens ({tokens - rest} for "
                f"the sentence, which is repeated for each of the {num_query} query frames); this model reads at most "
                f"{limit} (max_position_embeddings of its LLM): shorten the sentence to about "
                f"{max(0, len(text) * (limit - rest) // (tokens - rest))} characters"
            )
