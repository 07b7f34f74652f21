"""One video of anybody's, from a path and sentences to masks, pictures and a summary: ``glus.segment``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from glus.config import SettingsConfig
from glus.data.frames import FileVideo, VideoSource, open_video
from glus.data.masks import decode_rle, encode_rle
from glus.data.predictions import write_answers, write_mask
from glus.files import atomic_folder, is_empty, naming_write_errors, require_room, write_text
from glus.inference.job import check_lengths
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.pictures import check_movies, fit, legend, overlay, palette, write_movie
from glus.types import FrameResult

SUMMARY_FILE = "summary.json"
MOVIE_FILE = "overlay.mp4"
MOVIE_SIDES = (384, 1280)
"""A movie's longer side in pixels: smaller frames are enlarged, larger ones reduced."""
FRAMES_PER_SECOND = 24.0
"""Of the movie of a folder of pictures; a video file's is its own average."""


@dataclass(frozen=True)
class FrameMasks:
    """The answers to all sentences in one frame; masks are kept as run-length codes, some hundred bytes each."""

    name: str
    """Of the frame: its file's, or its number in a video file (``00000``, ...)."""
    size: tuple[int, int]
    """Height and width in pixels."""
    codes: list[str] = field(default_factory=list)
    """COCO's compressed run-length code per sentence."""
    areas: list[float] = field(default_factory=list)
    """Share of the frame that each mask covers."""
    scores: list[float] = field(default_factory=list)
    """Probability of [SEG] per sentence."""
    has_seg: list[bool] = field(default_factory=list)
    """Whether [SEG] was the likeliest answer; where not, the mask is empty unless ``force_seg``."""

    def masks(self) -> np.ndarray:
        """(E, H, W) bool."""
        return np.stack([decode_rle(code, self.size) for code in self.codes]).astype(bool)


@dataclass(frozen=True)
class Segmentation:
    """What sentences describe in a video.

    >>> for frame in glus.segment("my.mp4", ["the red car"], "outputs/glus_s").frames:
    ...     print(frame.name, frame.areas[0], frame.masks().shape)
    """

    texts: tuple[str, ...]
    """E sentences."""
    frames: list[FrameMasks]
    """In the order of the video."""

    def answers(self, sentence: int) -> Iterator[dict[str, Any]]:
        """What was answered to one sentence, frame by frame."""
        for frame in self.frames:
            row = (frame.areas[sentence], frame.scores[sentence], frame.has_seg[sentence])
            yield dict(zip(("frame", "area", "score", "has_seg"), (frame.name, *row), strict=True))


def segment(
    video: str | Path | VideoSource,
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
        video: folder of frames with any names, video file, or any object that reads frames by index.
        texts: the sentences.
        weights: model folder, or the run that trained it; a predictor from ``load_predictor`` to use it again.
        output: a new or empty folder to write masks, ``summary.json`` and then ``overlay.mp4`` to; None: write nothing.
        settings: override those of the model folder; a predictor has been given its own.
        frames_per_second: of the overlay; None: the video file's average, or 24.
        overwrite: replace the result of an earlier call in ``output``.
        show_progress: a bar on the terminal.
        allow_cpu: a model of the full size may run on a CPU, where it takes minutes a frame.

    Raises:
        FileNotFoundError: no video or no weights.
        ValueError: they are damaged, a sentence is empty or too long, ``frames_per_second`` is no speed of a movie,
            ``settings`` come with a predictor, or ``output`` must not be written.
        OSError: ``output`` cannot be written, for want of room for instance; nothing of it is left, but for the masks
            if it is the movie that cannot be written.
    """
    texts = _checked(texts)
    if settings is not None and isinstance(weights, VideoPredictor):
        raise ValueError("settings would not be used: the predictor has its own; give them to load_predictor")
    if output is None:
        return _predict(_opened(video), texts, weights, settings, show_progress, allow_cpu)
    palette(len(texts))  # too many sentences are better refused now than after the last frame
    output = Path(output).expanduser().absolute()
    _check_output(output, overwrite)
    with atomic_folder(output, replace=overwrite) as folder:
        source = _opened(video)
        average = source.frames_per_second if isinstance(source, FileVideo) else FRAMES_PER_SECOND
        rate = average if frames_per_second is None else frames_per_second
        check_movies(rate)
        require_room(folder, len(source) * len(texts))
        segmentation = _predict(source, texts, weights, settings, show_progress, allow_cpu)
        _write_masks(folder, segmentation)
        about = {"video": str(video), "weights": str(weights), "num_frames": len(source)}
        text = json.dumps({**about, "sentences": summarize_sentences(segmentation)}, indent=1, ensure_ascii=False)
        write_text(folder / SUMMARY_FILE, text + "\n")
    try:
        write_movie(output / MOVIE_FILE, _pictures(source, segmentation), rate)
    except (OSError, ValueError) as error:
        raise OSError(f"{error}; the masks and {SUMMARY_FILE} are complete in {output}") from error
    return segmentation


def sentence_folders(texts: Sequence[str]) -> list[str]:
    """Folder names of sentences: their letters and digits, with a number where nothing is left or two are equal.

    >>> sentence_folders(["The red car!", "the red car", "猫"])
    ['the-red-car', 'the-red-car-2', '猫']
    """
    names: list[str] = []
    for number, text in enumerate(texts, start=1):
        name = re.sub(r"\W+", "-", text.lower()).strip("-_")[:60] or "sentence"
        numbered = (f"{name}-{place}" for place in count(number))
        names.append(name if name not in ("sentence", *names) else next(one for one in numbered if one not in names))
    return names


def summarize_sentences(segmentation: Segmentation) -> list[dict[str, Any]]:
    """What was answered to each sentence, over all frames and in each."""
    summaries = []
    for number, (text, folder) in enumerate(zip(segmentation.texts, sentence_folders(segmentation.texts), strict=True)):
        answers = list(segmentation.answers(number))
        without_seg = sum(not answer["has_seg"] for answer in answers)
        empty = sum(answer["area"] == 0 for answer in answers)
        counts = {"text": text, "folder": folder, "without_seg": without_seg, "empty_masks": empty}
        summaries.append({**counts, "frames": answers})
    return summaries


def _checked(texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        raise ValueError(f"texts={texts!r}: expected a list of sentences")
    if not texts:
        raise ValueError("no sentence: say what is to be segmented")
    stripped = tuple(text.strip() for text in texts)
    for number, text in enumerate(stripped, start=1):
        if not text.strip(". "):
            raise ValueError(f"sentence {number} of {len(stripped)} is empty: say what is to be segmented")
    return stripped


def _check_output(path: Path, overwrite: bool) -> None:
    """It may be a new or empty folder, or to ``overwrite`` one that was made by ``segment``."""
    if os.path.exists(path) and not path.is_dir():
        raise ValueError(f"output {path} is a file; expected the name of a folder")
    if os.path.isdir(path) and not is_empty(path):
        if not (path / SUMMARY_FILE).is_file():
            raise ValueError(
                f"output {path} holds files, and no {SUMMARY_FILE} of an earlier run; choose a new or empty folder"
            )
        if not overwrite:
            raise ValueError(f"output {path} holds the result of an earlier run; choose another, or add --overwrite")


def _opened(video: str | Path | VideoSource) -> VideoSource:
    return open_video(os.path.expanduser(video)) if isinstance(video, str | Path) else video


def _predict(
    source: VideoSource,
    texts: Sequence[str],
    weights: str | Path | VideoPredictor,
    settings: SettingsConfig | None,
    show_progress: bool,
    allow_cpu: bool,
) -> Segmentation:
    if isinstance(weights, VideoPredictor):
        predictor = weights
    else:
        predictor = load_predictor(os.path.expanduser(weights), settings, allow_cpu)[0]
    check_lengths(predictor, ((f"sentence {number}", text) for number, text in enumerate(texts, start=1)))
    results: Iterable[FrameResult] = predictor.segment(source, texts)
    if show_progress:
        results = track(results, description="frames", total=len(source))
    return Segmentation(tuple(texts), [_frame_masks(source.names[result.frame], result) for result in results])


def _frame_masks(name: str, result: FrameResult) -> FrameMasks:
    assert result.rows == tuple(range(len(result.rows))), "without key frames, a result answers all sentences"
    return FrameMasks(
        name,
        (int(result.masks_RHW.shape[1]), int(result.masks_RHW.shape[2])),
        [encode_rle(mask) for mask in result.masks_RHW],
        [round(float(mask.mean()), 6) for mask in result.masks_RHW],
        [round(float(score), 6) for score in result.scores_R],
        [bool(has_seg) for has_seg in result.has_seg_R],
    )


def _write_masks(folder: Path, segmentation: Segmentation) -> None:
    for number, name in enumerate(sentence_folders(segmentation.texts)):
        with naming_write_errors(folder / name):
            (folder / name).mkdir()
        for frame in segmentation.frames:
            mask_HW = decode_rle(frame.codes[number], frame.size).astype(bool)
            write_mask(folder / name, frame.name, mask_HW, frame.scores[number], frame.has_seg[number])
        write_answers(folder / name, segmentation.answers(number))


def _pictures(video: VideoSource, segmentation: Segmentation) -> Iterator[np.ndarray]:
    """Each frame with the masks on it, above the legend."""
    colours = palette(len(segmentation.texts))
    for index, answers in enumerate(segmentation.frames):
        frame = video.read(index)
        long_side = int(np.clip(max(frame.shape[:2]), *MOVIE_SIDES))
        picture = overlay(*fit(frame, answers.masks(), long_side), colours)
        yield np.concatenate([picture, legend(segmentation.texts, colours, picture.shape[1])])
