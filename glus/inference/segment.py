"""One video of anybody's, from a path and sentences to masks, pictures and a summary: ``glus.segment``."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from glus import distributed
from glus.config import SettingsConfig
from glus.console import bar
from glus.data.frames import VideoInput, VideoPart, VideoSource, open_video
from glus.data.masks import encode_rle
from glus.data.predictions import rounded
from glus.files import atomic_folder, expanded, require_room
from glus.inference.job import check_lengths
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.segmentation import MOVIE_FILE, FrameMasks, Segmentation, check_output, movie_rate
from glus.types import FrameResult, require_utf8

log = logging.getLogger(__name__)

Starts = Sequence[int] | Literal["auto"]
"""For each sentence a frame; or the model is to choose."""
WITHOUT_WIDTH = (0x00AD, 0x200B, 0x2060, 0xFEFF)
"""Soft hyphen, zero width space, word joiner, byte order mark: web pages have them, and nobody sees them."""


def segment(
    video: VideoInput,
    texts: Sequence[str],
    weights: str | Path | VideoPredictor,
    output: str | Path | None = None,
    *,
    settings: SettingsConfig | None = None,
    frames: slice | None = None,
    key_frames: Starts | None = None,
    frames_per_second: float | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    allow_cpu: bool = False,
) -> Segmentation:
    """Segment what sentences describe in a video.

    Frames are decoded, segmented and forgotten one after another: memory grows by the codes of their masks alone.

    Args:
        video: folder of frames with any names, video file, picture, frames in memory (see ``open_video``), or any
            object that reads frames by index.
        texts: the sentences. White space of any kind and length becomes one blank; what has no width goes. (Sentences
            of benchmarks are taken letter for letter, as the released GLUS does.)
        weights: see ``load``; what that gives, to use a model again.
        output: a new or empty folder for masks, ``segmentation.json`` and then ``overlay.mp4``; None: write nothing.
        settings: override those of the model folder; a predictor has been given its own.
        frames: which to look at, as a slice of their numbers, such as ``slice(100, 200, 2)``; None: all. To the model
            they are the whole video; the others get no masks. They keep the names that they have in the video.
        key_frames: for each sentence the number (in the video) of the frame that it starts from, up and then down;
            "auto": the one that the model scores highest; None: the first.
        frames_per_second: of the overlay; None: the video file's average, or 24, so that it takes as long as the video.
        overwrite: replace the result of an earlier call in ``output``.
        show_progress: a bar on the terminal.
        allow_cpu: a model of the full size may run on a CPU, where it takes minutes a frame.

    Raises:
        FileNotFoundError: no video or no weights.
        ValueError: they are damaged, a sentence is empty, too long or no text, there are no such frames, or movies of
            such a speed, ``settings`` come with a predictor, or ``output`` must not be written.
        OSError: ``output`` cannot be written, for want of room for instance; nothing of it is left, but for the masks
            if it is the movie that cannot be written.
    """
    texts = _checked(texts)

    def answers(source: VideoSource) -> Segmentation:
        starts = _places(source, texts, key_frames)  # before the minutes that loading a model may take
        return _segmented(source, texts, _load_for(texts, weights, settings, allow_cpu), starts, show_progress)

    if output is None:
        return answers(_opened(video, frames))
    path = check_output(output, overwrite)
    with atomic_folder(path, replace=overwrite) as folder:
        source = _opened(video, frames)
        rate = movie_rate(source, frames_per_second)
        require_room(folder, len(source) * len(texts))
        segmentation = answers(source)
        named = str(video) if isinstance(video, str | Path) else type(video).__name__
        segmentation.write(folder, {"video": named, "weights": str(weights), "num_frames": len(source)})
    segmentation.write_movie(path / MOVIE_FILE, rate)
    return segmentation


def stream(
    video: VideoInput,
    texts: Sequence[str],
    weights: str | Path | VideoPredictor,
    settings: SettingsConfig | None = None,
    allow_cpu: bool = False,
    frames: slice | None = None,
) -> Iterator[FrameMasks]:
    """The answers of ``segment`` frame by frame, each as soon as it is there; the arguments are those of it.

    Yields:
        One for each frame, in the order of the video.

    Raises:
        FileNotFoundError, ValueError: see ``segment``.
    """
    texts, source = _checked(texts), _opened(video, frames)
    yield from _in_order(source, _load_for(texts, weights, settings, allow_cpu).segment(source, texts), len(texts))


def load(
    weights: str | Path | VideoPredictor, settings: SettingsConfig | None = None, allow_cpu: bool = False
) -> VideoPredictor:
    """A model that segments, to be used for many videos.

    Args:
        weights: a model folder, a run, a folder in the authors' layout, ``owner/name`` on Hugging Face, or
            ``"glus_shapes"``, the small one that is shipped; see ``models.hub.find_model``. A predictor is given back.
        settings: override those of the model folder; a predictor has been given its own.
        allow_cpu: a model of the full size may run on a CPU, where it takes minutes a frame.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is damaged, or too large for this machine.
    """
    if isinstance(weights, VideoPredictor):
        if settings is not None:
            raise ValueError("settings would not be used: the predictor has its own; give them to glus.load")
        return weights
    return load_predictor(expanded(weights), settings, allow_cpu)[0]


def _checked(texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise ValueError(f"texts={texts!r}: expected a list of sentences")
    if not texts:
        raise ValueError("no sentence: say what is to be segmented")
    for number, text in enumerate(texts, start=1):
        require_utf8(text, f"sentence {number} of {len(texts)}")
    even = tuple(" ".join(text.translate(dict.fromkeys(WITHOUT_WIDTH)).split()) for text in texts)
    for number, text in enumerate(even, start=1):
        if not text.strip(". "):
            raise ValueError(f"sentence {number} of {len(even)} is empty: say what is to be segmented")
    return even


def _opened(video: VideoInput, frames: slice | None) -> VideoSource:
    return open_video(video) if frames is None else VideoPart(open_video(video), frames)


def _load_for(
    texts: Sequence[str], weights: str | Path | VideoPredictor, settings: SettingsConfig | None, allow_cpu: bool
) -> VideoPredictor:
    """A model that can read these sentences."""
    predictor = load(weights, settings, allow_cpu)
    check_lengths(predictor, ((f"sentence {number}", text) for number, text in enumerate(texts, start=1)))
    return predictor


def _segmented(
    source: VideoSource, texts: Sequence[str], predictor: VideoPredictor, starts: Starts, show_progress: bool
) -> Segmentation:
    """The answers; the log gets what they cost."""
    began = time.perf_counter()
    if starts == "auto":
        starts = [int(place) for place in predictor.score_frames(source, texts).argmax(axis=1)]
        log.info("key frames: %s", ", ".join(source.names[place] for place in starts))
    results: Iterable[FrameResult] = predictor.segment(source, texts, starts)
    if show_progress:  # a frame that lies above some starts and below others is visited on the way up and down
        results = bar(results, len(source) - min(starts) + max(starts), "frames")
    found = Segmentation(tuple(texts), list(_in_order(source, results, len(texts))), source)
    seconds = time.perf_counter() - began
    size = f"frames: {len(source)}, sentences: {len(texts)}, device: {distributed.device_name()}"
    rate, memory = len(source) / seconds, distributed.peak_memory_gib()
    log.info("%s, %.1f s, %.2f frames/s, peak memory %.1f GiB", size, seconds, rate, memory)
    return found


def _places(source: VideoSource, texts: Sequence[str], key_frames: Starts | None) -> Starts:
    """Where key frames lie among the frames looked at."""
    if key_frames is None or key_frames == "auto":
        return key_frames or [0] * len(texts)
    if len(key_frames) != len(texts):
        raise ValueError(f"{len(key_frames)} key frames for {len(texts)} sentences: expected one each, or auto")
    numbers = source.numbers if isinstance(source, VideoPart) else range(len(source))
    for number in key_frames:
        if number not in numbers:
            step = f", every {numbers.step}." if numbers.step > 1 else ""
            raise ValueError(f"key frame {number}: the frames looked at are {numbers[0]} to {numbers[-1]}{step}")
    return [numbers.index(number) for number in key_frames]


def _in_order(source: VideoSource, results: Iterable[FrameResult], num_rows: int) -> Iterator[FrameMasks]:
    """Each frame, in order, as soon as all its sentences are answered (with key frames, not all of them together)."""
    answers: dict[int, dict[int, tuple[str, float, float, bool, float]]] = defaultdict(dict)
    frame, sizes = 0, dict[int, tuple[int, int]]()
    for result in results:
        height, width = result.masks_RHW.shape[1:]
        sizes[result.frame] = int(height), int(width)
        for row, mask, score, has_seg, object_score in zip(
            result.rows, result.masks_RHW, result.scores_R, result.has_seg_R, result.object_scores_R, strict=True
        ):
            shares = rounded(mask.mean()), rounded(score), bool(has_seg), rounded(object_score)
            answers[result.frame][row] = encode_rle(mask), *shares
        while len(answers.get(frame, ())) == num_rows:
            of_rows = answers.pop(frame)
            fields = zip(*(of_rows[row] for row in range(num_rows)), strict=True)
            yield FrameMasks(source.names[frame], sizes.pop(frame), *map(list, fields))
            frame += 1
