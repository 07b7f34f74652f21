"""Ground-truth masks as the benchmarks store them, read as 0/1 arrays of the frames' size.

- ``RleMasks``: run-length codes in one JSON file, by annotation id, read through a packed copy of it (``MaskPack``);
- ``PaletteMasks`` and ``FolderMasks``: PNG files (png_masks.py);
- ``PolygonMasks`` and ``ShapeMasks``: outlines of pictures, beside their sentences (benchmarks/outlines.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from glus.data.parallel import njit
from glus.files import atomic_file, cache_folder, read_object
from glus.types import Expression, Video

log = logging.getLogger(__name__)

FOREGROUND = 255
"""Value of an object's pixels in a file of its own."""

NUM_SAMPLES = 16
"""Pieces of the source that go into the fingerprint of a packed file."""
SAMPLE_BYTES = 4096
NUM_PARSED = 32
"""Annotations that a process keeps parsed, about 50 kB each: the expressions of a video name the same ones."""

FORM = 2
"""Of what is packed; raised when that changes, so that copies of before are made anew."""

Fingerprint = dict[str, int | str]
"""Of the source of a packed copy."""
Header = dict[str, Any]
"""``source``: its fingerprint; ``ids``; ``ends``: of each line, counted from the end of the header's."""
ReadAnnotations = Callable[[Path], dict[str, Any]]
"""From a file to the entries of each annotation, one per frame."""

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

    def existing_folder(self, name: str, expression: Expression) -> Path:
        """One below that of all masks.

        Raises:
            FileNotFoundError: as ``open``; or this one is missing, which should hold masks of the expression.
        """
        self.open()
        folder = self.path / name
        if not folder.is_dir():
            raise FileNotFoundError(f"masks of {expression.name} are missing; expected the folder {folder}")
        return folder

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

    def num_unlisted(self, expression: Expression) -> int:
        """Files of its masks in frames that the expression file does not list: nothing reads them."""
        return 0

    def files(self, video: Video) -> list[list[Path]]:
        """The mask files of a video that are there, each list in temporal order; none if all masks are in one file."""
        return []

    def values(self, video: Video) -> set[int]:
        """What the pixels of ``files`` may be, as far as the sentences tell."""
        return {0, FOREGROUND}


# ------------------------------------------------------------------------------------- one file of annotations


class RleMasks(MaskStore):
    """MeViS: ``mask_dict.json``, {annotation id: [COCO run-length code or null per frame]}, read through its packed
    copy, which each process opens itself."""

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


@njit
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


# -------------------------------------------------------------------------------------------- the packed copy


class MaskPack(Mapping[str, list[Any]]):
    """{annotation id: [entry per frame]} of a JSON file, read one by one from a packed copy that all processes share.

    The JSON of MeViS train (411 MB) takes seconds and more than 1 GB in every process that loads it. It is loaded once,
    and whole, which takes about three times its size at that moment (1.2 to 1.6 GB), and written as lines of JSON: a
    header, then a line for each annotation. If need be it is written anew. It lies beside the source
    (``mask_dict.json.packed``), where everybody who uses the dataset finds it; if that folder cannot be written, in
    ``$XDG_CACHE_HOME/glus`` (default ``~/.cache/glus``). It may be deleted at any time.

    It appears whole, by a rename, and nothing is locked, as some network file systems cannot: of several processes that
    build it at once, each with that memory, the last one's stays, and all are equal. So programs open it before they
    start processes. A killed one may leave a hidden file ``.mask_dict.json.packed.*``, which nobody needs.

    Args:
        source: the JSON file.
        read: for a file of another form than {annotation id: [entry per frame]}, what reads that from it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold that, or an annotation is damaged in its copy (when it is read).
        OSError: the copy can be written nowhere.
    """

    def __init__(self, source: Path, read: ReadAnnotations = read_object):
        self._path, self._data, header = _open_any(source) or _build(source, read)
        self._row = {annotation_id: row for row, annotation_id in enumerate(header["ids"])}
        ends = np.array([0, *header["ends"]])
        self._bounds = len(self._data) - ends[-1] + ends
        self._parse = lru_cache(NUM_PARSED)(self._parse_line)

    def __getitem__(self, annotation_id: str) -> list[Any]:
        return self._parse(self._row[annotation_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def _parse_line(self, row: int) -> list[Any]:
        begin, end = self._bounds[row : row + 2].tolist()
        try:
            entries: list[Any] = json.loads(self._data[begin:end])
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged ({error}); delete it, and it is made anew") from error
        return entries


def pack_paths(source: Path) -> tuple[Path, ...]:
    """Where the packed copy of ``source`` may lie: beside it, or in the user's cache folder if there is one."""
    beside = source.with_name(f"{source.name}.packed")
    digest, caches = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16], cache_folder()
    return (beside, caches / f"{source.name}.{digest}.packed") if caches else (beside,)


def fingerprint(source: Path) -> Fingerprint:
    """What tells a changed source: its size, its time, and a hash of pieces spread over it.

    Tools that keep times (rsync, tar, unzip) can replace a file by another of the same size and time; hashing all of
    it would take longer than opening may.
    """
    status = source.stat()
    digest = hashlib.sha256()
    with source.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(max(0, status.st_size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"form": FORM, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


def _open_any(source: Path) -> tuple[Path, mmap.mmap, Header] | None:
    """The first usable copy, mapped; a file in its place that is of no use is told of in the log."""
    expected = fingerprint(source)
    for path in pack_paths(source):
        try:
            return path, *_open(path, expected)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s cannot be used (%s); it is made anew", path, error)
    return None


def _open(path: Path, expected: Fingerprint) -> tuple[mmap.mmap, Header]:
    """A mapped copy and its header; ValueError if it is cut short, something else, or of another source."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError: an empty file
    start = data.find(b"\n") + 1
    header = json.loads(data[:start])
    if not isinstance(header, dict) or header.keys() != {"source", "ids", "ends"}:
        raise ValueError("it is no packed mask file")
    if start + sum(header["ends"][-1:]) != len(data):
        raise ValueError("it is cut short")
    if header["source"] != expected:
        raise ValueError("it was made from another state of its source, or by another version")
    return data, header


def _build(source: Path, read: ReadAnnotations) -> tuple[Path, mmap.mmap, Header]:
    """Pack the source in the first place that can be written.

    Raises:
        ValueError: the source is malformed, or changed in the meantime.
        OSError: there is no such place.
    """
    start, expected = time.perf_counter(), fingerprint(source)
    ids, lines = _packed(source, read)
    if fingerprint(source) != expected:
        raise ValueError(f"{source} changed while it was read; start again when it is complete")
    header = {"source": expected, "ids": ids, "ends": [*accumulate(map(len, lines))]}
    failures = []
    for path in pack_paths(source):
        try:
            with atomic_file(path, is_contested=True) as temporary, temporary.open("wb") as file:
                file.writelines([json.dumps(header).encode() + b"\n", *lines])
                os.fchmod(file.fileno(), source.stat().st_mode & 0o666)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # no permission, no space
            failures.append(f"{path}: {error.strerror or error}")
            log.info("cannot pack %s there: %s", source, failures[-1])
        else:
            log.info("packed %d annotations of %s in %.1f s", len(ids), source, time.perf_counter() - start)
            return path, *_open(path, expected)
    raise OSError(
        f"the masks of {source} cannot be packed anywhere: {'; '.join(failures)}. "
        "Make one of these folders writable or set XDG_CACHE_HOME to another"
    )


def _packed(source: Path, read: ReadAnnotations) -> tuple[list[str], list[bytes]]:
    """The annotation ids of a source, and the line of each."""
    annotations = read(source)
    ids, lines = list(annotations), []
    for annotation_id in ids:
        entries = annotations.pop(annotation_id)  # what is packed makes room for the lines
        if not isinstance(entries, list):
            raise ValueError(f"{source}: annotation {annotation_id!r} is no list of one mask per frame")
        lines.append(json.dumps(entries).encode() + b"\n")
    return ids, lines
