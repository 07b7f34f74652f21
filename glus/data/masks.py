"""Ground-truth masks as the benchmarks store them, read as 0/1 arrays of the frames' size.

- ``RleMasks``: run-length codes in one JSON file, by annotation id, read through a packed copy of it (``MaskPack``);
- ``PaletteMasks``: a PNG per frame whose pixels are object ids;
- ``FolderMasks``: a folder per object or sentence, with a PNG of 0 and 255 per frame;

Outlines of pictures are read beside their sentences: ``PolygonMasks`` and ``ShapeMasks`` (outlines.py).

Pixels of a PNG are read as the numbers that the file holds. A conversion to colour or grey would lose them: OpenCV
turns the palette indices 0, 1, 2 of Ref-YouTube-VOS into 0, 38, 75.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from glus.data.mask_pack import MaskPack
from glus.data.parallel import njit
from glus.files import field, read_object
from glus.types import Expression, Video

VOID = 255
"""Palette index of pixels that belong to no object for sure (DAVIS)."""
FOREGROUND = 255
"""Value of an object's pixels in a file of its own."""

Size = tuple[int, int]
"""Height and width in pixels."""
Parts = list[list[np.ndarray]]
"""For each frame the masks that are to be united: pixels, (H, W) with any non-zero one foreground, or run lengths, (n,)
int64 (``unpack_runs``)."""


class MaskStore(ABC):
    """Where the masks of a split come from; it reads nothing before it is asked, and may be sent to other processes.

    Args:
        name: of the dataset, for messages.
        path: of the file or folder of its masks.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path

    def open(self) -> None:
        """Make sure that the masks are there; those in one file are packed, which can fail for all of them.

        Raises:
            FileNotFoundError: the file or folder is missing.
            ValueError, OSError: as ``MaskPack``.
        """
        if not self.path.exists():
            raise FileNotFoundError(
                f"dataset {self.name!r} has no masks at {self.path}; "
                "a split without public masks cannot be trained on or scored"
            )

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """The union of the expression's objects.

        Args:
            expression: without annotation ids the masks are empty.
            frames: F indices into ``expression.frames``.
            size: (H, W) of the frames; masks of another size are an error.

        Returns:
            (F, H, W) uint8 of 0/1.

        Raises:
            FileNotFoundError: the file with the masks is missing.
            ValueError: a mask has the wrong size, does not decode, or is not listed.
        """
        masks = np.zeros((len(frames), *size), np.uint8)
        for mask_HW, parts in zip(masks, self.parts(expression, frames, size), strict=True):
            for part in parts:
                mask_HW |= draw_runs(part, size) if part.ndim == 1 else part
        return masks

    def parts(self, expression: Expression, frames: Sequence[int], size: Size) -> Parts:
        """What ``read`` unites, as it is stored; errors as ``read``."""
        found = {frame: self.objects(expression, frame, size) for frame in dict.fromkeys(frames)}
        return [found[frame] for frame in frames]  # training repeats the one frame of a picture

    @abstractmethod
    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """The masks of the expression's objects in one frame (see ``Parts``), pixels 0 or 1; errors as ``read``."""

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray | None:
        """Pixels whose truth is unknown: areas that ReasonSeg labels "ignore", void (255) of Ref-DAVIS17.

        A protocol that knows such pixels takes them out of prediction and truth before it counts anything. They are
        never part of what ``read`` returns. Ref-DAVIS17's protocol B scores as if there were none.

        Returns:
            (F, H, W) bool; None where the layout has no such pixels.

        Raises:
            FileNotFoundError, ValueError: as ``read``.
        """
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """Frames for which there is a truth, be it an empty mask; ``read`` may not be asked for others.

        All of them, but for masks that lie in one folder per object or sentence (ReasonVOS, Ref-YouTube-VOS valid),
        where only the frames with a file are (ReasonVOS' official script scores just these), and for a picture of
        ReasonSeg without outlines (two of test).

        Returns:
            (T,) bool.

        Raises:
            FileNotFoundError: the folder of the masks is missing.
        """
        return np.ones(len(expression.frames), bool)

    def files(self, video: Video) -> list[list[Path]]:
        """The mask files of a video that are there, each list in temporal order; none if all masks are in one file."""
        return []

    def values(self, video: Video) -> set[int]:
        """What the pixels of ``files`` may be, as far as the sentences tell."""
        return {0, FOREGROUND}


# ------------------------------------------------------------------------------------- one file of annotations


class PackedMasks(MaskStore):
    """Masks by annotation id in one JSON file, read through its packed copy, which each process opens itself."""

    @staticmethod
    def read_annotations(path: Path) -> dict[str, Any]:
        """What is packed: {annotation id: [entry per frame]}."""
        return read_object(path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pack"}

    @cached_property
    def pack(self) -> MaskPack:
        """All annotations; errors as ``open``."""
        super().open()
        return MaskPack(self.path, self.read_annotations)

    def open(self) -> None:
        """See ``MaskStore.open``."""
        len(self.pack)

    def entries(self, expression: Expression, annotation_id: str) -> list[Any]:
        """Of one of its annotations, one per frame; ValueError if it is not listed."""
        try:
            return self.pack[annotation_id]
        except KeyError as error:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}") from error


class RleMasks(PackedMasks):
    """MeViS: ``mask_dict.json``, {annotation id: [COCO run-length code or null per frame]}."""

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``: run lengths of those in sight."""
        found = []
        for annotation_id in expression.annotation_ids:
            entries = self.entries(expression, annotation_id)
            if len(entries) != len(expression.frames):
                raise ValueError(
                    f"masks of {expression.name}: annotation {annotation_id} in {self.path} has {len(entries)} "
                    f"entries; expected one for each of the video's {len(expression.frames)} frames"
                )
            if entries[frame] is not None:
                name = f"mask of {frame_name(expression, frame)}, annotation {annotation_id} in {self.path}"
                found.append(runs_of(entries[frame], size, name))
        return found


# ------------------------------------------------------------------------------------------------- PNG files


class PaletteMasks(MaskStore):
    """Ref-YouTube-VOS train, Ref-DAVIS17: ``<folder>/<video>/<frame>.png``, whose pixels are object ids."""

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``."""
        values = [int(annotation_id) for annotation_id in expression.annotation_ids]
        return [np.isin(self._indices(expression, frame, size), values)] if values else []

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray | None:
        """See ``MaskStore.ignore``: pixels of value 255, of which Ref-YouTube-VOS has none."""
        return np.stack([self._indices(expression, frame, size) == VOID for frame in frames])

    def files(self, video: Video) -> list[list[Path]]:
        """See ``MaskStore.files``."""
        paths = [self._file(video[0], frame) for frame in range(len(video[0].frames))]
        return [[path for path in paths if path.is_file()]]

    def values(self, video: Video) -> set[int]:
        """See ``MaskStore.values``."""
        return {0, VOID, *(int(annotation_id) for one in video for annotation_id in one.annotation_ids)}

    def listed_objects(self) -> dict[str, set[int]]:
        """The objects of each video in ``meta.json`` beside the masks, where Ref-YouTube-VOS lists also those that no
        sentence is about.

        Raises:
            ValueError: it is malformed.
        """
        path = self.path.parent / "meta.json"
        if not path.is_file():
            return {}
        videos = field(read_object(path), "videos", dict, str(path))
        return {
            video: {int(number) for number in field(content, "objects", dict, f"{path}: videos[{video!r}]")}
            for video, content in videos.items()
        }

    def num_objects(self, expression: Expression, size: Size) -> int:
        """The largest id in the video's first frame, by which DAVIS counts a video's objects; errors as ``read``."""
        first_HW = self._indices(expression, 0, size)
        return int(first_HW[first_HW != VOID].max(initial=0))

    def _indices(self, expression: Expression, frame: int, size: Size) -> np.ndarray:
        """(H, W) uint8."""
        self.open()
        return _read_png(self._file(expression, frame), frame_name(expression, frame), size)

    def _file(self, expression: Expression, frame: int) -> Path:
        return self.path / expression.video / f"{expression.frames[frame]}.png"


class FolderMasks(MaskStore):
    """Long-RVOS, ReasonVOS, Ref-YouTube-VOS valid: ``<folder>/<annotation id>/<frame>.png`` of 0 and 255.

    Args:
        name: of the dataset, for messages.
        path: of the folder of all masks.
        absent_is_empty: whether a frame without a file is one without the object (Long-RVOS), or one without truth.
    """

    def __init__(self, name: str, path: Path, absent_is_empty: bool):
        super().__init__(name, path)
        self.absent_is_empty = absent_is_empty

    def objects(self, expression: Expression, frame: int, size: Size) -> list[np.ndarray]:
        """See ``MaskStore.objects``."""
        folders = [self._folder(expression, annotation_id) for annotation_id in expression.annotation_ids]
        paths = [folder / f"{expression.frames[frame]}.png" for folder in folders]
        there = [path for path in paths if path.is_file() or not self.absent_is_empty]
        return [_read_foreground(path, frame_name(expression, frame), size) for path in there]

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: frames for which every object has a file, unless no file means no object."""
        is_annotated_T = super().annotated(expression)
        if not self.absent_is_empty:
            for annotation_id in expression.annotation_ids:
                there = {path.stem for path in self._folder(expression, annotation_id).glob("*.png")}
                is_annotated_T &= [frame in there for frame in expression.frames]
        return is_annotated_T

    def files(self, video: Video) -> list[list[Path]]:
        """See ``MaskStore.files``."""
        ids = dict.fromkeys(annotation_id for one in video for annotation_id in one.annotation_ids)
        paths = [[self.path / annotation_id / f"{frame}.png" for frame in video[0].frames] for annotation_id in ids]
        return [[path for path in of_one if path.is_file()] for of_one in paths]

    def _folder(self, expression: Expression, annotation_id: str) -> Path:
        self.open()
        folder = self.path / annotation_id
        if not folder.is_dir():
            raise FileNotFoundError(f"masks of {expression.name} are missing; expected the folder {folder}")
        return folder


def _read_png(path: Path, name: str, size: Size, modes: Sequence[str] = ("P", "L")) -> np.ndarray:
    """(H, W) of the numbers in a file of one of these PIL modes: uint8, bool for mode "1"."""
    if not path.is_file():
        raise FileNotFoundError(f"mask of {name} is missing; expected {path}")
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"mask of {name} does not decode: {path}: {error}") from error
    if mode not in modes:
        raise ValueError(f"mask of {name}: {path} has mode {mode}; expected palette or grey ({', '.join(modes)})")
    require_size(f"mask of {name}: {path}", values.shape, size)
    return values


def _read_foreground(path: Path, name: str, size: Size) -> np.ndarray:
    """(H, W) bool. A file of small numbers only, such as 0/1 or object ids, is an error and not an empty mask."""
    values = _read_png(path, name, size, modes=("L", "P", "1"))
    if values.dtype == bool:
        return values
    is_foreground = values >= FOREGROUND
    if values.any() and not is_foreground.any():
        raise ValueError(f"mask of {name}: {path} has values up to {values.max()}; expected foreground of {FOREGROUND}")
    return is_foreground


# -------------------------------------------------------------------------------------------------- messages


def by(size: Sequence[int]) -> str:
    """Height x width."""
    return "x".join(str(side) for side in size)


def frame_name(expression: Expression, frame: int) -> str:
    """How messages call a frame."""
    return f"{expression.name}, frame {expression.frames[frame]}"


def require_size(mask: str, found: Sequence[int], size: Size) -> None:
    """Raise ValueError, beginning with this description of a mask, unless it is of the frame's size."""
    if list(found) != list(size):
        turned = "; only the frame is turned, by its EXIF orientation?" if list(found) == list(size)[::-1] else ""
        raise ValueError(f"{mask} is {by(found)}, but the frame is {by(size)} (height x width){turned}")


# ------------------------------------------------------------------------------------------- run-length codes
#
# COCO's code of a mask, compressed (text) or plain (a list of runs). Runs alternate between 0 and 1, starting with 0,
# down the columns. The compressed form holds each run in groups of five bits, least significant first, as characters
# from "0" on; the sixth bit says that another follows, and from the fourth run on it is the difference from the run two
# before (cocoapi's ``maskApi.c``).


def encode_rle(mask_HW: np.ndarray) -> str:
    """The compressed code of a mask, character for character that of pycocotools.

    Args:
        mask_HW: (H, W) of any type; whatever is not zero is foreground.
    """
    return coco.encode(np.asfortranarray(mask_HW != 0).view(np.uint8))["counts"].decode("ascii")


def decode_rle(counts: str | bytes | list[int], size: Size) -> np.ndarray:
    """(H, W) uint8 of 0/1; arguments and errors as of ``unpack_runs``."""
    return draw_runs(unpack_runs(counts, size), size)


def runs_of(code: Any, size: Size, name: str) -> np.ndarray:
    """(n,) int64 run lengths of an entry of a JSON file, {size, counts}.

    Args:
        code: the entry.
        size: (H, W) of the frame.
        name: begins messages: which mask of which file.

    Raises:
        ValueError: it is no run-length code, not of this size, or does not decode.
    """
    match code:
        case {"size": [*found], "counts": str() | list() as counts}:
            require_size(name, found, size)
            try:
                return unpack_runs(counts, size)
            except ValueError as error:
                raise ValueError(f"{name} does not decode: {error}") from error
    raise ValueError(f"{name}: expected null or {{size, counts}}, found {code!r:.80}")


def draw_runs(runs: np.ndarray, size: Size) -> np.ndarray:
    """(H, W) uint8 of 0/1."""
    return np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs).reshape(size[::-1]).T


def unpack_runs(counts: str | bytes | list[int], size: Size) -> np.ndarray:
    """(n,) int64 run lengths in pixels, with the checks that pycocotools leaves out.

    Args:
        counts: compressed (text) or plain (list) run lengths.
        size: (H, W).

    Raises:
        ValueError: it is no such code, or the runs do not make up H x W pixels.
    """
    if isinstance(counts, list):
        runs = np.asarray(counts, np.int64)
        covered = int(runs.sum())
        if runs.min(initial=0) < 0:
            raise ValueError("it has a run of negative length")
    else:
        text = counts.encode("utf-8") if isinstance(counts, str) else counts
        runs, covered = _decompress(np.frombuffer(text, np.uint8))
        if covered < 0:
            raise ValueError("it is not a compressed run-length code")
    num_pixels = size[0] * size[1]
    if covered != num_pixels:
        raise ValueError(f"its runs cover {covered} pixels instead of {num_pixels}")
    return runs


@njit(cache=True, nogil=True)
def _decompress(text: np.ndarray) -> tuple[np.ndarray, int]:
    """(n,) int64 run lengths from the characters of a compressed code, and their sum; -1 if it is no such code."""
    runs = np.empty(text.size, np.int64)
    num_runs, covered, run, shift = 0, 0, 0, 0
    for character in text:
        group = int(character) - 48
        if group < 0 or group > 63 or shift > 30:  # a foreign character, or a run longer than any image
            return runs, -1
        run |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            run -= 1 << shift
        if num_runs > 2:
            run += int(runs[num_runs - 2])
        if run < 0:
            return runs, -1
        runs[num_runs] = run
        covered += run
        num_runs, run, shift = num_runs + 1, 0, 0
    return runs[:num_runs], -1 if shift or num_runs == 0 else covered
