"""Predictions on disk, in the two forms that they may have: written complete or not at all, and read strictly.

- PNG: ``<folder>/<expression.prediction_dir>/<frame>.png``, any non-zero pixel is foreground;
- RLE: ``<folder>/<video>.jsonl``, lines ``{"frame": name, "size": [H, W], "masks": {exp_id: COCO compressed counts}}``
  in any order; a frame may be spread over several lines. Other keys of a line are not looked at. Some hundred times
  fewer files.

A mask means the same in both, so scores do not depend on the form. No file is trusted: what is damaged is told of, and
never read as an empty mask.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from glus.config import PredictionForm
from glus.data.masks import Parts, Size, by, decode_rle, encode_rle, unpack_runs
from glus.data.parallel import njit
from glus.files import atomic_file, atomic_folder, distinct_keys, naming_write_errors, read_json
from glus.types import Expression, FrameResult, Video

MaskWriter = Callable[[str, FrameResult], None]
"""Takes the name of a frame and the answers to any of a video's expressions in it."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3
"""Colour types of the PNG specification whose pixels are single numbers."""
SUB, UP, AVERAGE, PAETH = 1, 2, 3, 4
"""Row filters of the PNG specification; 0 is none."""


class UnusablePrediction(Exception):
    """A prediction that cannot be scored; the message says what is wrong with which file."""


class Doubt(Enum):
    """Why a mask that can be read may not be the one that was meant."""

    values = "hold more values than 0 and one other, of which all but 0 are foreground"
    """Probabilities, smooth edges, pictures with a mask on them."""
    alpha = "are transparent elsewhere than where their colours are 0; colours alone count"
    palette = "give 0, the background, another colour than black, as a palette that was made anew does"
    full = "cover the whole frame"


def is_predicted(folder: Path, video: Video, form: PredictionForm) -> bool:
    """Whether all masks of a video are there."""
    if form is PredictionForm.rle:
        return (folder / video[0].prediction_file).is_file()
    return all((folder / expression.prediction_dir).is_dir() for expression in video)


def write_predictions(folder: Path, video: Video, form: PredictionForm) -> AbstractContextManager[MaskWriter]:
    """A writer of one video's masks, which appear when the block ends; an error in it deletes them.

    What a killed run left is replaced. Its expressions must be predicted together, also where a killed run has finished
    some of them, which are left as they are: in a batch of another size, a pixel on the threshold may fall to the other
    side.
    """
    return _write_codes(folder, video) if form is PredictionForm.rle else _write_pngs(folder, video)


@contextmanager
def _write_pngs(folder: Path, video: Video) -> Iterator[MaskWriter]:
    with ExitStack() as stack:
        paths = {row: folder / expression.prediction_dir for row, expression in enumerate(video)}
        folders = {row: stack.enter_context(atomic_folder(path)) for row, path in paths.items() if not path.is_dir()}
        answers: dict[int, list[dict[str, Any]]] = {row: [] for row in folders}

        def write(frame: str, result: FrameResult) -> None:
            for number, row in enumerate(result.rows):
                if row in folders:
                    mask_HW = result.masks_RHW[number]
                    write_mask(folders[row], frame, mask_HW)
                    scores = {"score": result.scores_R[number], "object_score": result.object_scores_R[number]}
                    shares = {name: rounded(share) for name, share in {"area": mask_HW.mean(), **scores}.items()}
                    answers[row].append({"frame": frame, **shares, "has_seg": bool(result.has_seg_R[number])})

        yield write
        for row, temporary in folders.items():
            write_answers(temporary, answers[row])


def write_mask(folder: Path, frame: str, mask_HW: np.ndarray) -> None:
    """Save a mask of the frame's size as ``<frame>.png``, 8-bit grey, 0 or 255, in the folder of an expression."""
    png = encode_png(mask_HW)
    with naming_write_errors(folder):
        (folder / f"{frame}.png").write_bytes(png)


def rounded(share: float) -> float:
    """As shares of 1 are written."""
    return round(float(share), 6)


def encode_png(mask_HW: np.ndarray) -> bytes:
    """A mask, whose foreground is not 0, as a grey PNG of 0 and 255."""
    # A third of the time that Pillow takes. OpenCV's own writing to disk would not tell why it fails.
    return cv2.imencode(".png", (mask_HW != 0).astype(np.uint8) * 255)[1].tobytes()


def write_answers(folder: Path, answers: Iterable[dict[str, Any]]) -> None:
    """Write ``answers.json`` beside the masks of an expression, a line per frame."""
    with naming_write_errors(folder):
        (folder / "answers.json").write_text("[\n" + ",\n".join(map(json.dumps, answers)) + "\n]\n")


@contextmanager
def _write_codes(folder: Path, video: Video) -> Iterator[MaskWriter]:
    """A line per result."""
    path = folder / video[0].prediction_file
    with atomic_file(path) as temporary:

        def write(frame: str, result: FrameResult) -> None:
            ids = [video[row].exp_id for row in result.rows]
            line = {
                "frame": frame,
                "size": list(result.masks_RHW.shape[1:]),
                "masks": dict(zip(ids, map(encode_rle, result.masks_RHW), strict=True)),
                "scores": dict(zip(ids, map(rounded, result.scores_R), strict=True)),
                "has_seg": dict(zip(ids, map(bool, result.has_seg_R), strict=True)),
                "object_scores": dict(zip(ids, map(rounded, result.object_scores_R), strict=True)),
            }
            with naming_write_errors(path), temporary.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

        with naming_write_errors(path):
            temporary.write_bytes(b"")
        yield write


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
    for e in video:
        if (folder / e.prediction_dir).is_dir():
            raise ValueError(f"{e.name} is predicted twice: {rle} and {folder / e.prediction_dir}; delete one")
    return RlePredictions(rle, video)


class VideoPredictions(ABC):
    """The predictions for one video."""

    problems: tuple[str, ...] = ()
    """What is wrong with the form as a whole (RLE: lines that cannot be read)."""
    warnings: tuple[str, ...] = ()
    """What belongs to no expression or no frame of the video (RLE; for PNGs see ``unexpected_files``)."""

    def __init__(self) -> None:
        self.doubts: dict[str, Doubt] = {}
        """Of files that have been read."""

    def parts(self, expression: Expression, frames: Sequence[int], size: Size) -> tuple[Parts, dict[int, str]]:
        """The masks of some frames, as they are stored.

        Args:
            expression: of the video.
            frames: F indices.
            size: (H, W) that masks must have.

        Returns:
            A mask for each frame, or none where it is missing, does not decode, or is of another size; and for each of
            those its frame's index with a line that says what is wrong.
        """
        parts: Parts = [[] for _ in frames]
        unusable = {}
        for of_frame, frame in zip(parts, frames, strict=True):
            try:
                of_frame.append(self._mask(expression, expression.frames[frame], size))
            except UnusablePrediction as error:
                unusable[frame] = f"{expression.name}, frame {expression.frames[frame]}: {error}"
        return parts, unusable

    @abstractmethod
    def no_answer(self, expression: Expression) -> str | None:
        """A line that says so if there is nothing at all for this expression."""

    @abstractmethod
    def _mask(self, expression: Expression, frame: str, size: Size) -> np.ndarray:
        """Pixels or run lengths of one frame, see ``Parts``; or UnusablePrediction."""


class PngPredictions(VideoPredictions):
    """One PNG for each expression and frame."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def no_answer(self, expression: Expression) -> str | None:
        """See ``VideoPredictions``."""
        folder = self.folder / expression.prediction_dir
        return None if folder.is_dir() else f"no folder {folder} and no {self.folder / expression.prediction_file}"

    def _mask(self, expression: Expression, frame: str, size: Size) -> np.ndarray:
        path = self.folder / expression.prediction_dir / f"{frame}.png"
        mask_HW, doubt = read_png(path, size)
        if doubt:
            self.doubts[str(path)] = doubt
        return mask_HW


class RlePredictions(VideoPredictions):
    """The run-length codes of one video, held compressed, about 1 kB a mask.

    Args:
        path: the file.
        video: the expressions that are expected in it.

    A line that cannot be read and a mask that is given twice are problems; masks of unknown expressions or frames are
    warnings.
    """

    def __init__(self, path: Path, video: Video):
        super().__init__()
        self.path = path
        # By expression and frame: number of the line, counts, size.
        self._codes: dict[str, dict[str, list[tuple[int, str, Size]]]] = {}
        problems = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line:
                continue
            try:
                frame, size, masks = _parse(line)
                for exp_id, counts in masks.items():
                    self._codes.setdefault(exp_id, {}).setdefault(frame, []).append((number, counts, size))
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
        self.problems = tuple(problems)
        self.warnings = tuple(self._unexpected(video))

    def no_answer(self, expression: Expression) -> str | None:
        """See ``VideoPredictions``."""
        return None if expression.exp_id in self._codes else f"{self.path} has no mask of it"

    def _mask(self, expression: Expression, frame: str, size: Size) -> np.ndarray:
        found = self._codes.get(expression.exp_id, {}).get(frame, [])
        if not found:
            raise UnusablePrediction(f"{self.path} has no mask of it")
        if len(found) > 1:
            lines = " and ".join(str(number) for number, *_ in found)
            raise UnusablePrediction(f"{self.path} has it more than once, in lines {lines}")
        number, counts, found_size = found[0]
        if found_size != tuple(size):
            raise UnusablePrediction(f"its mask in {self.path}, line {number}, is {wrong_size(found_size, size)}")
        try:
            return unpack_runs(counts, size)
        except ValueError as error:
            raise UnusablePrediction(f"its mask in {self.path} does not decode: {error}") from error

    def _unexpected(self, video: Video) -> Iterator[str]:
        for exp_id in sorted(self._codes.keys() - {expression.exp_id for expression in video}):
            yield f"{self.path}: masks of no expression {exp_id!r}"
        for e in video:
            extra = sorted(self._codes.get(e.exp_id, {}).keys() - set(e.frames))
            if extra:
                yield f"{self.path}: {len(extra)} masks of expression {e.exp_id!r} in no frame, the first {extra[0]!r}"


def _parse(line: bytes) -> tuple[str, Size, dict[str, str]]:
    """Frame, size and masks of a line; ValueError if it is not as expected."""
    try:
        entry = json.loads(line, object_pairs_hook=distinct_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError("is not complete JSON (damaged or cut short)") from error
    match entry:
        case {"frame": str(frame), "size": [int(height), int(width)], "masks": dict(masks)}:
            if all(isinstance(counts, str) for counts in masks.values()):
                return frame, (height, width), masks
    raise ValueError(f"expected {{frame: name, size: [H, W], masks: {{exp_id: counts}}}}, found {entry!r:.80}")


def unexpected_files(folder: Path, videos: Iterable[Video]) -> list[str]:
    """Folders with PNGs of no expression, PNGs of no frame, and ``.jsonl`` files of no video, as sorted lines."""
    videos = list(videos)
    expected = {folder / expression.prediction_dir: expression.frames for video in videos for expression in video}
    rle_files = {folder / video[0].prediction_file for video in videos}
    lines = []
    for name, subfolders, files in os.walk(folder):
        subfolders.sort()
        frames = expected.get(Path(name))
        known = {f"{frame}.png" for frame in frames or ()}
        pngs = sorted(file for file in files if file.endswith(".png") and file not in known)
        if pngs:
            nothing = "expression" if frames is None else f"frame, the first {pngs[0]}"
            lines.append(f"{name}: {len(pngs)} PNGs of no {nothing}")
        jsonl = (Path(name) / file for file in sorted(files) if file.endswith(".jsonl"))
        lines += [f"{path}: masks of no video" for path in jsonl if path not in rle_files]
    return lines


def count_doubts(doubts: Mapping[str, Doubt]) -> list[str]:
    """A line for each kind: how many masks, and the first."""
    names = {doubt: [name for name, found in doubts.items() if found is doubt] for doubt in Doubt}
    return [f"{len(of)} masks {doubt.value}; the first: {of[0]}" for doubt, of in names.items() if of]


def read_answers(folder: Path, expression: Expression) -> list[dict[str, Any]]:
    """What the model answered for an expression, frame by frame: ``score``, ``has_seg``, ``object_score`` (which
    older predictions lack) and ``area``.

    Raises:
        FileNotFoundError: another program made the predictions.
        ValueError: a frame has no answer, or the file is damaged.
    """
    file = folder / expression.prediction_file
    if file.is_file():
        try:
            answers = dict(_answers_of_codes(file, expression.exp_id))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    else:
        answers = {answer["frame"]: answer for answer in read_json(folder / expression.prediction_dir / "answers.json")}
    missing = [frame for frame in expression.frames if frame not in answers]
    if missing:
        raise ValueError(f"{folder} has no answer of {expression.name} in frame {missing[0]}")
    return [answers[frame] for frame in expression.frames]


def _answers_of_codes(file: Path, exp_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if exp_id in entry["masks"]:
            area = float(decode_rle(entry["masks"][exp_id], tuple(entry["size"])).mean())
            kept = {"score": "scores", "has_seg": "has_seg", "object_score": "object_scores"}
            answer = {name: entry[key][exp_id] for name, key in kept.items() if key in entry}
            yield entry["frame"], {**answer, "area": area}


# ----------------------------------------------------------------------------------------------- PNG decoder
#
# The usual kinds of mask (grey or palette indices of up to 8 bits, not interlaced) are inflated here and counted, which
# no image library does: libpng and Pillow decode a file whose checksums are right but which has pixels too many. Every
# other kind goes through Pillow.


def read_png(path: Path, size: Size) -> tuple[np.ndarray, Doubt | None]:
    """A mask file as (H, W) bool, foreground where any colour channel is not 0; and whether that may be wrong.

    Reads every PNG (1-bit, grey, palette indices, colour; alpha is ignored) and trusts none: checksums are verified,
    since a damaged file can otherwise decode to a partly black mask.

    Raises:
        UnusablePrediction: the file is missing, does not decode, or is not of ``size`` (H, W).
    """
    try:
        return decode_png(path.read_bytes(), size)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UnusablePrediction(f"{path} {reason}") from error
    except UnusablePrediction as error:
        raise UnusablePrediction(f"{path} {error}") from error


def decode_png(data: bytes, size: Size) -> tuple[np.ndarray, Doubt | None]:
    """What ``read_png`` does with the bytes of a file.

    Raises:
        UnusablePrediction: they do not decode, or are not of ``size``; the message lacks the name of the file.
    """
    try:
        header, compressed, colours = _read_chunks(data)
        width, height, bit_depth, colour_type, _, _, interlace = struct.unpack(">IIBBBBB", header)
        if (height, width) != tuple(size):
            raise UnusablePrediction(f"is {wrong_size((height, width), size)}")
        is_usual = colour_type in (GREY, PALETTE) and bit_depth <= 8 and not interlace
        mask_HW, doubt = _decode_rows(compressed, size, bit_depth) if is_usual else _decode_with_pillow(data)
        is_recoloured = colour_type == PALETTE and any(colours[:3])
        return mask_HW, doubt or (Doubt.palette if is_recoloured else None)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise UnusablePrediction("is not a readable PNG (damaged or cut short)") from error


def wrong_size(found: Size, expected: Size) -> str:
    """What is wrong with a mask of another size, to go after "is"."""
    return f"{by(found)}, but the video's frames are {by(expected)} (height x width)"


def _read_chunks(data: bytes) -> tuple[bytes, bytes, bytes]:
    """The header, the compressed pixels and the palette.

    Raises:
        ValueError: not every chunk up to the last is whole and unchanged.
    """
    if not data.startswith(SIGNATURE):
        raise ValueError("not a PNG")
    chunks = {b"IHDR": b"", b"IDAT": b"", b"PLTE": b""}
    view, start = memoryview(data), len(SIGNATURE)
    while b"IEND" not in chunks:
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if end + 4 > len(data) or zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("a chunk is damaged or missing")
        kind = data[start + 4 : start + 8]
        chunks[kind] = chunks.get(kind, b"") + data[start + 8 : end]
        start = end + 4
    return chunks[b"IHDR"], chunks[b"IDAT"], chunks[b"PLTE"]


def _decode_rows(compressed: bytes, size: Size, bit_depth: int) -> tuple[np.ndarray, Doubt | None]:
    """(H, W) bool, doubt; ValueError or zlib.error unless there are exactly as many pixels as ``size`` says."""
    height, width = size
    row_bytes = -(-width * bit_depth // 8)
    expected = height * (1 + row_bytes)
    inflater = zlib.decompressobj()
    rows = inflater.decompress(compressed, expected + 1)
    if len(rows) != expected or not inflater.eof:
        raise ValueError(f"{len(rows)} bytes of pixels instead of {expected}")
    values_Hb = np.empty((height, row_bytes), np.uint8)
    if not _undo_filters(np.frombuffer(rows, np.uint8).reshape(height, 1 + row_bytes), values_Hb):
        raise ValueError("an unknown row filter")
    if bit_depth < 8:
        bits = np.unpackbits(values_Hb, axis=1, count=width * bit_depth).reshape(height, width, bit_depth)
        values_Hb = np.packbits(bits, axis=2)[..., 0]  # multiples of the values
    # They are all 0 or the largest if and only if so many of these have this sum. Without new memory, which costs more.
    has_two = cv2.sumElems(values_Hb)[0] == int(values_Hb.max()) * cv2.countNonZero(values_Hb)
    mask_HW = np.not_equal(values_Hb, 0, out=values_Hb.view(bool))
    return mask_HW, None if has_two else Doubt.values


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, Doubt | None]:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels: np.ndarray = np.asarray(image)
        has_alpha = image.mode.endswith("A")
    colours_HWC = pixels[..., :-1] if has_alpha else pixels.reshape(*pixels.shape[:2], -1)
    mask_HW = np.logical_or.reduce(colours_HWC, axis=2)
    foreground_NC = colours_HWC[mask_HW]
    if has_alpha and np.ptp(pixels[..., -1]) and not np.array_equal(pixels[..., -1] != 0, mask_HW):
        return mask_HW, Doubt.alpha
    return mask_HW, Doubt.values if (foreground_NC != foreground_NC[:1]).any() else None


@njit
def _undo_filters(rows_Hb: np.ndarray, values_Hb: np.ndarray) -> bool:
    """Undo the filter that each row's first byte names, one byte a pixel (or several pixels); False if unknown."""
    above_b = np.zeros(values_Hb.shape[1], np.uint8)
    for row in range(rows_Hb.shape[0]):
        kind = rows_Hb[row, 0]
        if kind > PAETH:
            return False
        left, upper_left = 0, 0
        for x in range(above_b.size):
            upper = int(above_b[x])
            predicted = 0
            if kind == SUB:
                predicted = left
            elif kind == UP:
                predicted = upper
            elif kind == AVERAGE:
                predicted = (left + upper) // 2
            elif kind == PAETH:
                predicted = _nearest(left, upper, upper_left)
            left = (rows_Hb[row, 1 + x] + predicted) & 255
            values_Hb[row, x] = left
            upper_left = upper
        above_b = values_Hb[row]
    return True


@njit
def _nearest(left: int, upper: int, upper_left: int) -> int:
    """Paeth's prediction: the neighbour that is nearest to left + upper - upper left."""
    to_left, to_upper = abs(upper - upper_left), abs(left - upper_left)
    to_upper_left = abs(left + upper - 2 * upper_left)
    if to_left <= to_upper and to_left <= to_upper_left:
        return left
    return upper if to_upper <= to_upper_left else upper_left
