"""A packed copy of MeViS' ``mask_dict.json`` that is mapped into memory instead of being read.

The JSON of MeViS train (411 MB) takes seconds and more than 1 GB in every process that loads it. It is read once, in
the memory of one annotation, and written as one file::

    codes        the run-length codes, one after the other
    starts       int64 (annotations + 1): the entry of each annotation's first frame
    offsets      int64 (entries + 1): where in the file the code of each (annotation, frame) begins
    sizes        int32 (entries, 2): height and width; 0 0 for null; -1 -1: the "code" is the JSON of something else
    header       JSON: what the source was when it was read, and the annotation ids
    footer       where starts and header begin, the length of the file, and a signature with the version

Opening it maps the file and reads the header; all processes of a machine share the pages that they touch.

The copy lies beside the source (``mask_dict.json.packed``), where everybody who uses the dataset finds it; if that
folder cannot be written, in ``$XDG_CACHE_HOME/glus`` (default ``~/.cache/glus``). It may be deleted at any time.

It appears whole, by a rename. One process builds it and others wait: the file being built, ``*.partial``, is locked
with flock, which the kernel releases when its holder is killed; the next one starts it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from glus.data.mask_store import no_masks
from glus.data.rle import Size, decode_rle
from glus.types import Expression

CHUNK = 1 << 22
"""Characters read at a time; a value that is longer doubles it until it fits."""


def iterate_members(path: Path, chunk: int = CHUNK) -> Iterator[tuple[str, Any]]:
    """(key, value) of every member of the object that a file holds, in its order; a key that comes twice comes twice.

    It is as fast as ``json.loads``, whose scanner it uses, and needs tens of MB where that needs more than twice the
    file.

    Raises:
        ValueError: the file does not hold one JSON object, with the position of the first mistake.
    """
    with path.open(encoding="utf-8") as file:
        scanner = _Scanner(path, file, chunk)
        scanner.expect("{")
        separator = "}" if scanner.skip("}") else ","
        while separator == ",":
            key = scanner.value()
            if not isinstance(key, str):
                raise scanner.error(f"expected a name in quotes, found {key!r:.40}")
            scanner.expect(":")
            yield key, scanner.value()
            separator = scanner.expect(",}")
        scanner.expect_end()


class _Scanner:
    """A window over a text file that moves on and grows as needed."""

    def __init__(self, path: Path, file: TextIO, chunk: int):
        self._path, self._file, self._chunk = path, file, chunk
        self._text, self._at = "", 0
        self._dropped = 0  # characters of the file before the window
        self._decoder = json.JSONDecoder()

    def value(self) -> Any:
        """The JSON value that comes next."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                position = self._dropped + error.pos
                if not self._grow():
                    raise self.error(error.msg, position) from error
                continue
            if end + 3 > len(self._text) and self._grow():
                continue  # a number may go on: 1 could be the beginning of 1.5 or 1e+5
            self._at = end
            return value

    def expect(self, characters: str) -> str:
        """One of ``characters``, which must come next."""
        found = self._peek()
        if not found or found not in characters:
            raise self.error(f"expected {' or '.join(map(repr, characters))}, found {found or 'the end'!r}")
        self._at += 1
        return found

    def skip(self, character: str) -> bool:
        """Whether ``character`` comes next; if so, move behind it."""
        is_next = self._peek() == character
        self._at += is_next
        return is_next

    def expect_end(self) -> None:
        """Nothing but white space may come."""
        if self._peek():
            raise self.error("expected the end")

    def error(self, message: str, position: int | None = None) -> ValueError:
        """What is wrong at a position of the file; the default is the current one."""
        position = self._dropped + self._at if position is None else position
        return ValueError(f"{self._path} is not JSON as expected: {message} at character {position}")

    def _peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def _grow(self) -> bool:
        """Drop what was read and read on; False at the end of the file."""
        rest = self._text[self._at :]
        try:
            more = self._file.read(max(self._chunk, len(rest)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is not UTF-8 text: {error}") from error
        if more:
            self._dropped += self._at
            self._text, self._at = rest + more, 0
        return bool(more)


log = logging.getLogger(__name__)

FOOTER = struct.Struct("<QQQ8s")
SIGNATURE = b"GLUSRLE1"
NUM_SAMPLES = 16
"""Pieces of the source that go into its fingerprint."""
SAMPLE_BYTES = 4096

Fingerprint = dict[str, int | str]
ReadMembers = Callable[[Path], Iterator[tuple[str, Any]]]
"""From a file to annotation ids and their entries, one per frame."""


@dataclass(frozen=True)
class Code:
    """A mask's compressed run-length code and its size."""

    counts: bytes
    size: Size


class MaskCache:
    """The masks of one ``mask_dict.json``, from its packed copy, which is built or rebuilt if need be.

    Args:
        source: the JSON file, {annotation id: [COCO run-length code or null per frame]}.
        read: for a file of another form, what gives these members of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold that, or lists an annotation twice.
        OSError: the copy can be written nowhere.
    """

    def __init__(self, source: Path, read: ReadMembers = iterate_members):
        self._map, arrays_at, header = _open_or_build(source, read)
        self.ids: tuple[str, ...] = tuple(header["ids"])
        """The annotation ids, in the order of the file."""
        self._row = {annotation_id: row for row, annotation_id in enumerate(self.ids)}
        self._starts = np.frombuffer(self._map, np.int64, len(self.ids) + 1, arrays_at)
        num_entries, offsets_at = int(self._starts[-1]), arrays_at + self._starts.nbytes
        self._offsets = np.frombuffer(self._map, np.int64, num_entries + 1, offsets_at)
        self._sizes = np.frombuffer(self._map, np.int32, 2 * num_entries, offsets_at + self._offsets.nbytes)

    def __contains__(self, annotation_id: str) -> bool:
        """Whether the file has this annotation."""
        return annotation_id in self._row

    def length(self, annotation_id: str) -> int:
        """Number of entries of an annotation; there should be one per frame of its video."""
        row = self._row[annotation_id]
        return int(self._starts[row + 1] - self._starts[row])

    def entry(self, annotation_id: str, frame: int) -> Any:
        """What the file says of an annotation in a frame, by index.

        Returns:
            None (absent), a ``Code``, or whatever else the JSON holds there (plain runs, a mistake).
        """
        assert 0 <= frame < self.length(annotation_id), (annotation_id, frame)
        entry = int(self._starts[self._row[annotation_id]]) + frame
        height, width = self._sizes[2 * entry : 2 * entry + 2].tolist()
        if height == 0:
            return None
        begin, end = self._offsets[entry : entry + 2].tolist()
        data = self._map[begin:end]
        return Code(data, (height, width)) if height > 0 else json.loads(data)


# --------------------------------------------------------------------------------------------------- opening


def cache_paths(source: Path) -> tuple[Path, ...]:
    """Where the packed copy of ``source`` may lie: beside it, or in the user's cache folder if there is one."""
    beside = source.with_name(f"{source.name}.packed")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):  # a user without a home, as containers have them
        return (beside,)
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    return beside, Path(caches) / "glus" / f"{source.name}.{place}.packed"


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
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


Opened = tuple[mmap.mmap, int, dict[str, Any]]
"""A mapped file, where its arrays begin, and its header."""


def _open_or_build(source: Path, read: ReadMembers) -> Opened:
    expected = fingerprint(source)
    for path in cache_paths(source):
        opened, problem = _open(path, expected)
        if opened:
            return opened
        if problem:
            log.warning("%s %s; it is made anew", path, problem)
    return _build(source, read, expected)


def _open(path: Path, expected: Fingerprint) -> tuple[Opened | None, str]:
    """What was opened; or None and why, which is empty if there is no such file."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:  # ValueError: it is empty
        return None, f"cannot be read ({error})"
    length = len(mapped)
    footer = FOOTER.unpack(mapped[-FOOTER.size :]) if length >= FOOTER.size else (0, 0, 0, b"")
    arrays_at, header_at, written, signature = footer
    if (written, signature) != (length, SIGNATURE):
        return None, "is cut short or is no packed mask file of this version"
    header = json.loads(mapped[header_at : -FOOTER.size])
    if header["source"] != expected:
        return None, "was made from another state of its source"
    return (mapped, arrays_at, header), ""


# -------------------------------------------------------------------------------------------------- building


def _build(source: Path, read: ReadMembers, expected: Fingerprint) -> Opened:
    """Pack the source in the first place that can be written.

    Raises:
        OSError: there is none.
    """
    failures = []
    for path in cache_paths(source):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            with _lock(partial) as file:
                opened, _ = _open(path, expected)  # written by another process while this one waited
                if opened:
                    return opened
                _pack(source, read, expected, file)
                partial.replace(path)
            opened, problem = _open(path, expected)
            assert opened, (path, problem)
            return opened
        except OSError as error:  # no permission, no space, no locks
            failures.append(f"{path}: {error.strerror or error}")
            log.info("cannot pack %s there: %s", source, failures[-1])
    raise OSError(
        f"the masks of {source} cannot be packed anywhere: {'; '.join(failures)}. "
        "Make one of these folders writable or set XDG_CACHE_HOME to another"
    )


@contextmanager
def _lock(partial: Path) -> Iterator[BinaryIO]:
    """The empty file ``partial``, which no other process has; unless it was renamed, it is removed in the end."""
    file = _lock_existing(partial)
    try:
        file.truncate(0)
        yield file
    finally:
        if _is_at(file, partial):
            partial.unlink()
        file.close()


def _lock_existing(partial: Path) -> BinaryIO:
    """A locked file at ``partial``: not one that its former holder renamed or removed while this process waited."""
    while True:
        file = partial.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process to write %s", partial)
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, partial):
            return file
        file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _pack(source: Path, read: ReadMembers, expected: Fingerprint, file: BinaryIO) -> None:
    """Write the packed form of ``source``, down to the disk.

    Raises:
        ValueError: it is malformed, or changed in the meantime.
    """
    start = time.perf_counter()
    ids: dict[str, None] = {}
    offsets, starts, sizes = array("q", [0]), array("q", [0]), array("i")
    for annotation_id, entries in read(source):
        if annotation_id in ids:
            raise ValueError(f"{source} lists annotation {annotation_id!r} twice")
        if not isinstance(entries, list):
            raise ValueError(f"{source}: annotation {annotation_id!r} is no list of one mask per frame")
        for entry in entries:
            data, size = _packed(entry)
            file.write(data)
            offsets.append(offsets[-1] + len(data))
            sizes.extend(size)
        ids[annotation_id] = None
        starts.append(len(offsets) - 1)
    if fingerprint(source) != expected:
        raise ValueError(f"{source} changed while it was read; start again when it is complete")
    arrays_at = offsets[-1] + file.write(bytes(-offsets[-1] % 8))
    header_at = arrays_at + sum(file.write(numbers.tobytes()) for numbers in (starts, offsets, sizes))
    header = json.dumps({"source": expected, "ids": list(ids)}).encode()
    file.write(header)
    file.write(FOOTER.pack(arrays_at, header_at, header_at + len(header) + FOOTER.size, SIGNATURE))
    os.fchmod(file.fileno(), source.stat().st_mode & 0o666)
    file.flush()
    os.fsync(file.fileno())
    log.info("packed %d annotations of %s in %.1f s", len(ids), source, time.perf_counter() - start)


def _packed(entry: Any) -> tuple[bytes, tuple[int, int]]:
    """The bytes and the two numbers that stand for an entry."""
    match entry:
        case None:
            return b"", (0, 0)
        case {"size": [int(height), int(width)], "counts": str(counts)} if (
            0 < height < 2**31 and 0 < width < 2**31 and counts.isascii()
        ):
            return counts.encode("ascii"), (height, width)
        case _:
            return json.dumps(entry).encode("ascii"), (-1, -1)


class MaskFile:
    """Masks by annotation id, read through a packed copy that all processes map into their memory (``mask_cache``).

    Args:
        name: of the dataset, for messages.
        path: of the file.
        read: for a file of another form than MeViS', see ``MaskCache``.
    """

    def __init__(self, name: str, path: Path, read: ReadMembers = iterate_members):
        self.path = path
        self._name, self._read = name, read
        self._opened: MaskCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the file itself."""
        return {**vars(self), "_opened": None}

    def open(self) -> MaskCache:
        """The masks; opened on first use.

        Raises:
            FileNotFoundError: there is no file of masks.
            ValueError: it is malformed.
            OSError: its packed copy can be written nowhere.
        """
        if self._opened is None:
            if not self.path.is_file():
                raise no_masks(self._name, self.path)
            self._opened = MaskCache(self.path, self._read)
        return self._opened

    def open_with(self, expression: Expression, annotation_id: str) -> MaskCache:
        """The masks, with this annotation of ``expression`` among them.

        Raises:
            FileNotFoundError, ValueError, OSError: as ``open``; or the annotation is not there.
        """
        masks = self.open()
        if annotation_id not in masks:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}")
        return masks

    def decode(self, counts: str | bytes | list[int], size: Size, name: str) -> np.ndarray:
        """(H, W) uint8 of 0/1 of a run-length code of this file; ``name`` is how messages call the mask.

        Raises:
            ValueError: it is no code of a mask of this size.
        """
        try:
            return decode_rle(counts, size)
        except ValueError as error:
            raise ValueError(f"mask of {name} in {self.path} does not decode: {error}") from error
