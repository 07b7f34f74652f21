"""What ``glus.segment`` answers: masks of sentences in the frames of a video, and what people make of them."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glus.data.frames import VideoPart, VideoSource
from glus.data.masks import decode_rle
from glus.data.predictions import write_answers, write_mask
from glus.data.sampling import context_indices_eval
from glus.data.video_file import FileVideo
from glus.files import atomic_folder, expanded, field, is_empty, naming_write_errors, read_object, write_text
from glus.painter import Painter, numbers, palette
from glus.pictures import annotate, check_movies, fit, legend, side_by_side, titled, write_movie

SEGMENTATION_FILE = "segmentation.json"
MOVIE_FILE = "overlay.mp4"
MOVIE_SIDES = (384, 1280)
"""A movie's longer side in pixels: smaller frames are enlarged, larger ones reduced."""
FRAMES_PER_SECOND = 24.0
"""Of the movie of a folder of pictures; a video file's is its own average."""
_PREVIEW_FRAMES, _PREVIEW_SIDE = 4, 240
"""Of a notebook's preview, and their longer side in pixels."""


@dataclass(frozen=True)
class FrameMasks:
    """The answers to all sentences in one frame; masks are kept as run-length codes, some hundred bytes each."""

    name: str
    """Of the frame: its file's, or its number in a video file (``00000``, ...)."""
    size: tuple[int, int]
    """Height and width in pixels."""
    codes: list[str]
    """COCO's compressed run-length code per sentence."""
    areas: list[float]
    """Share of the frame that each mask covers."""
    scores: list[float]
    """Probability of [SEG] per sentence."""
    has_seg: list[bool]
    """Whether [SEG] was the likeliest answer; where not, the mask is empty unless ``force_seg``."""
    object_scores: list[float]
    """Of the segmenter per sentence; 0 where it was not asked."""

    def masks(self) -> np.ndarray:
        """(E, H, W) bool."""
        return np.stack([decode_rle(code, self.size) for code in self.codes]).astype(bool)


@dataclass(frozen=True, repr=False)
class Segmentation:
    """What sentences describe in a video.

    >>> found = glus.segment("my.mp4", ["the red car"], "outputs/glus_s")
    >>> found.masks("the red car").shape, found.frames[0].areas
    """

    texts: tuple[str, ...]
    """E sentences."""
    frames: list[FrameMasks]
    """In the order of the video."""
    video: VideoSource
    """What was segmented; pictures read its frames again."""

    def __repr__(self) -> str:
        height, width = self.frames[0].size
        return f"Segmentation({len(self.texts)} sentences, {len(self.frames)} frames of {width}x{height})"

    def _repr_html_(self) -> str:
        """A strip of a few frames, of the first one's size, for notebooks."""
        alike = [index for index, frame in enumerate(self.frames) if frame.size == self.frames[0].size]
        chosen = [alike[index] for index in sorted(set(context_indices_eval(len(alike), _PREVIEW_FRAMES)))]
        pictures = [titled(self.overlay(index, _PREVIEW_SIDE), self.frames[index].name) for index in chosen]
        strip = side_by_side(pictures)
        below = legend(self.texts, palette(len(self.texts)), strip.shape[1])
        png = cv2.imencode(".png", np.concatenate([strip, below])[..., ::-1])[1].tobytes()
        return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{len(self.texts)} sentences">'

    def number(self, sentence: int | str) -> int:
        """Of a sentence, given by its number or its text.

        Raises:
            ValueError: there is none.
        """
        if isinstance(sentence, str):
            if sentence not in self.texts:
                raise ValueError(f"no sentence {sentence!r}; there are {list(self.texts)}")
            return self.texts.index(sentence)
        if not -len(self.texts) <= sentence < len(self.texts):
            raise ValueError(f"no sentence number {sentence}; there are {len(self.texts)}")
        return sentence

    def masks(self, sentence: int | str) -> np.ndarray:
        """(T, H, W) bool: the answers to a sentence.

        Raises:
            ValueError: there is none, or the video's frames differ in size: see ``frames``.
        """
        row = self.number(sentence)
        sizes = sorted({frame.size for frame in self.frames})
        if len(sizes) > 1:
            raise ValueError(f"frames of {len(sizes)} sizes have no common array; take frames[i].masks() one by one")
        return np.stack([decode_rle(frame.codes[row], frame.size) for frame in self.frames]).astype(bool)

    def answers(self, sentence: int) -> Iterator[dict[str, Any]]:
        """What was answered to one sentence, frame by frame."""
        for frame in self.frames:
            shares = {"area": frame.areas, "score": frame.scores, "object_score": frame.object_scores}
            of_sentence = {name: values[sentence] for name, values in shares.items()}
            yield {"frame": frame.name, **of_sentence, "has_seg": frame.has_seg[sentence]}

    def describe(self, sentence: int) -> str:
        """The answers to a sentence in one line.

        >>> found.describe(0)
        'the red car: found in 14 of 16 frames'
        """
        num_found, num_frames = sum(answer["area"] > 0 for answer in self.answers(sentence)), len(self.frames)
        where = f"found in {num_found}" if num_found else f"not found in {num_frames}"
        return f"{self.texts[sentence]}: {where} of {num_frames} frames"

    def overlay(self, frame: int, long_side: int | None = None) -> np.ndarray:
        """(h, w, 3) uint8 RGB: a frame with all masks on it.

        Args:
            frame: its number.
            long_side: of the picture in pixels; None: the frame's own.
        """
        pixels, masks = self.video.read(frame), self.frames[frame].masks()
        painter = Painter(numbers(len(self.texts)), palette(len(self.texts)))
        return painter.draw(*fit(pixels, masks, long_side or max(pixels.shape[:2])))

    def to_coco(self) -> dict[str, list[dict[str, Any]]]:
        """A COCO dataset: frames are images, sentences are categories (from 1 on), non-empty masks are annotations."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, frame in enumerate(self.frames):
            height, width = frame.size
            images.append({"id": number, "file_name": frame.name, "height": height, "width": width})
            for row, code in enumerate(frame.codes):
                mask = decode_rle(code, frame.size)
                if mask.any():
                    code_of = {"size": [height, width], "counts": code}
                    box = [int(value) for value in cv2.boundingRect(mask)]
                    facts = {"segmentation": code_of, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}
                    ids = {"id": len(annotations) + 1, "image_id": number, "category_id": row + 1}
                    annotations.append({**ids, **facts, "score": frame.scores[row]})
        categories = [{"id": row + 1, "name": text} for row, text in enumerate(self.texts)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def to_supervision(self, frame: int) -> Any:
        """``supervision.Detections`` of a frame: its non-empty masks, ``class_id`` is the number of the sentence.

        Raises:
            ImportError: supervision is not installed.
        """
        import supervision

        masks, scores = self.frames[frame].masks(), np.array(self.frames[frame].scores, np.float32)
        rows = np.flatnonzero(masks.any(axis=(1, 2)))
        corners = [cv2.boundingRect(masks[row].astype(np.uint8)) for row in rows]
        boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in corners], np.float32).reshape(-1, 4)
        return supervision.Detections(xyxy=boxes, mask=masks[rows], confidence=scores[rows], class_id=rows)

    def save(self, output: str | Path, frames_per_second: float | None = None, overwrite: bool = False) -> None:
        """Write what ``glus.segment`` writes where it is given an ``output``; the arguments are those of it.

        Raises:
            ValueError, OSError: see ``glus.segment``.
        """
        path, rate = check_output(output, overwrite), movie_rate(self.video, frames_per_second)
        with atomic_folder(path, replace=overwrite) as folder:
            self.write(folder, {})
        self.write_movie(path / MOVIE_FILE, rate)

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """The masks and ``segmentation.json``, which begins with ``about``."""
        for number, name in enumerate(sentence_folders(self.texts)):
            with naming_write_errors(folder / name):
                (folder / name).mkdir()
            for frame in self.frames:
                mask_HW = decode_rle(frame.codes[number], frame.size).astype(bool)
                write_mask(folder / name, frame.name, mask_HW)
            write_answers(folder / name, self.answers(number))
        text = json.dumps({**about, "sentences": summarize_sentences(self)}, indent=1, ensure_ascii=False)
        write_text(folder / SEGMENTATION_FILE, text + "\n")

    def write_movie(self, path: Path, frames_per_second: float) -> None:
        """Each frame with the masks on it, above the legend.

        Raises:
            OSError: it cannot be written; the masks beside it are complete.
        """
        try:
            write_movie(path, annotate(self.texts, self._scaled()), frames_per_second)
        except (OSError, ValueError) as error:
            raise OSError(f"{error}; the masks and {SEGMENTATION_FILE} are complete in {path.parent}") from error

    def _scaled(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Name, frame and masks of each frame, of a size for looking at."""
        for index, answers in enumerate(self.frames):
            long_side = int(np.clip(max(answers.size), *MOVIE_SIDES))
            yield answers.name, *fit(self.video.read(index), answers.masks(), long_side)


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


def check_output(output: str | Path, overwrite: bool) -> Path:
    """Where a result may be written: a new or empty folder, or to ``overwrite`` one that holds an earlier result.

    Raises:
        ValueError: it is none of these, or holds something else besides, which would be lost.
    """
    path = expanded(output).absolute()
    if os.path.exists(path) and not path.is_dir():
        raise ValueError(f"output {path} is a file; expected the name of a folder")
    if os.path.isdir(path) and not is_empty(path):
        if not (path / SEGMENTATION_FILE).is_file():
            raise ValueError(
                f"output {path} holds files, and no {SEGMENTATION_FILE} of an earlier run; choose a new or empty folder"
            )
        if not overwrite:
            raise ValueError(f"output {path} holds the result of an earlier run; choose another, or add --overwrite")
        file = path / SEGMENTATION_FILE
        sentences = field(read_object(file), "sentences", list, str(file))
        folders = [field(sentence, "folder", str, str(file)) for sentence in sentences]
        result = {SEGMENTATION_FILE, MOVIE_FILE, *folders}
        others = sorted(entry.name for entry in path.iterdir() if entry.name not in result and entry.name[0] != ".")
        if others:
            raise ValueError(
                f"output {path} holds {others[0]} besides the result of an earlier run, and --overwrite would delete "
                "it: move it, or choose another folder"
            )
    return path


def movie_rate(video: VideoSource, frames_per_second: float | None) -> float:
    """Of the overlay: as asked for, or the video file's average, or 24, of a part that leaves out frames as many fewer;
    found out before the first frame is segmented.

    Raises:
        ValueError: it is no speed of a movie.
        OSError: movies cannot be written here.
    """
    whole, every = (video.whole, video.numbers.step) if isinstance(video, VideoPart) else (video, 1)
    average = (whole.frames_per_second if isinstance(whole, FileVideo) else FRAMES_PER_SECOND) / every
    rate = average if frames_per_second is None else frames_per_second
    check_movies(rate)
    return rate
