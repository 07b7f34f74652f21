"""One video of anybody's, from a path and sentences to masks, pictures and a summary: ``glus.segment``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from glus.config import SettingsConfig
from glus.console import bar
from glus.data.frames import VideoInput, VideoSource, open_video
from glus.data.masks import encode_rle
from glus.data.predictions import rounded
from glus.files import atomic_folder, expanded, require_room
from glus.inference.job import check_lengths
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.segmentation import MOVIE_FILE, FrameMasks, Segmentation, check_output, movie_rate
from glus.painter import palette
from glus.types import FrameResult, require_utf8

WITHOUT_WIDTH = (0x00AD, 0x200B, 0x2060, 0xFEFF)
"""Soft hyphen, zero width space, word joiner, byte order mark: web pages have them, and nobody sees them."""


def segment(
    video: VideoInput,
    texts: Sequence[str],
    weights: str | Path | VideoPredictor,
    output: str | Path | None = None,
    *,
    settings: SettingsConfig | None = None,
    frames_per_second: float | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
    allow_cpu: bool = False,
) -> Segmentation:
    """Segment what sentences describe in a video.

    Frames are decoded, segmented and forgotten one after another, so that memory does not grow with the video but by
    the codes of its masks.

    Args:
        video: folder of frames with any names, video file, picture, frames in memory (see ``open_video``), or any
            object that reads frames by index.
        texts: the sentences. White space of any kind and length becomes one blank; what has no width goes. (Sentences
            of benchmarks are taken letter for letter, as the released GLUS does.)
        weights: see ``load``; what that gives, to use a model again.
        output: a new or empty folder to write masks, ``summary.json`` and then ``overlay.mp4`` to; None: write nothing.
        settings: override those of the model folder; a predictor has been given its own.
        frames_per_second: of the overlay; None: the video file's average, or 24.
        overwrite: replace the result of an earlier call in ``output``.
        show_progress: a bar on the terminal.
        allow_cpu: a model of the full size may run on a CPU, where it takes minutes a frame.

    Raises:
        FileNotFoundError: no video or no weights.
        ValueError: they are damaged, a sentence is empty, too long or no text, ``frames_per_second`` is no speed of a
            movie, ``settings`` come with a predictor, or ``output`` must not be written.
        OSError: ``output`` cannot be written, for want of room for instance; nothing of it is left, but for the masks
            if it is the movie that cannot be written.
    """
    texts = _checked(texts)
    if settings is not None and isinstance(weights, VideoPredictor):
        raise ValueError("settings would not be used: the predictor has its own; give them to glus.load")
    if output is None:
        return _segmented(open_video(video), texts, weights, settings, show_progress, allow_cpu)
    palette(len(texts))  # too many sentences are better refused now than after the last frame
    path = check_output(output, overwrite)
    with atomic_folder(path, replace=overwrite) as folder:
        source = open_video(video)
        rate = movie_rate(source, frames_per_second)
        require_room(folder, len(source) * len(texts))
        segmentation = _segmented(source, texts, weights, settings, show_progress, allow_cpu)
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
) -> Iterator[FrameMasks]:
    """The answers of ``segment`` frame by frame, each as soon as it is there; the arguments are those of it.

    Yields:
        One for each frame, in the order of the video.

    Raises:
        FileNotFoundError, ValueError: see ``segment``.
    """
    texts, source = _checked(texts), open_video(video)
    predictor = load(weights, settings, allow_cpu)
    check_lengths(predictor, ((f"sentence {number}", text) for number, text in enumerate(texts, start=1)))
    for result in predictor.segment(source, texts):
        yield _frame_masks(source.names[result.frame], result)


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


def _segmented(
    source: VideoSource,
    texts: Sequence[str],
    weights: str | Path | VideoPredictor,
    settings: SettingsConfig | None,
    show_progress: bool,
    allow_cpu: bool,
) -> Segmentation:
    frames: Iterable[FrameMasks] = stream(source, texts, weights, settings, allow_cpu)
    if show_progress:
        frames = bar(frames, len(source), "frames")
    return Segmentation(tuple(texts), list(frames), source)


def _frame_masks(name: str, result: FrameResult) -> FrameMasks:
    assert result.rows == tuple(range(len(result.rows))), "without key frames, a result answers all sentences"
    return FrameMasks(
        name,
        (int(result.masks_RHW.shape[1]), int(result.masks_RHW.shape[2])),
        [encode_rle(mask) for mask in result.masks_RHW],
        [rounded(mask.mean()) for mask in result.masks_RHW],
        list(map(rounded, result.scores_R)),
        [bool(has_seg) for has_seg in result.has_seg_R],
        list(map(rounded, result.object_scores_R)),
    )
