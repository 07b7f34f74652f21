"""A large JSON file of masks, packed once so that every process reads single annotations from one copy."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from glus.files import cache_folder, read_object

log = logging.getLogger(__name__)

NUM_SAMPLES = 16
"""Pieces of the source that go into the fingerprint of a packed file."""
SAMPLE_BYTES = 4096
NUM_PARSED = 32
"""Annotations that a process keeps parsed, about 50 kB each: the expressions of a video name the same ones."""

Fingerprint = dict[str, int | str]
"""Of the source of a packed copy."""
Header = dict[str, Any]
"""``source``: its fingerprint; ``ids``; ``ends``: of each line, counted from the end of the header's."""
ReadAnnotations = Callable[[Path], dict[str, Any]]
"""From a file to the entries of each annotation, one per frame."""


class MaskPack(Mapping[str, list[Any]]):
    """{annotation id: [entry per frame]} of a JSON file, read one by one from a packed copy that all processes share.

    The JSON of MeViS train (411 MB) takes seconds and more than 1 GB in every process that loads it. It is loaded once,
    and whole, which takes about three times its size at that moment (1.2 to 1.6 GB), and written as lines of JSON: a
    header, then a line for each annotation. If need be it is written anew. It lies beside the source
    (``mask_dict.json.packed``), where everybody who uses the dataset finds it; if that folder cannot be written, in
    ``$XDG_CACHE_HOME/glus`` (default ``~/.cache/glus``). It may be deleted at any time.

    It appears whole, by a rename, and nothing is locked, as some network file systems cannot: of several processes that
    build it at once, each with that memory, the last one's stays, and all are equal. So programs open it before they
    start processes. A killed one may leave a hidden folder ``.mask_dict.json.packed.*``, which nobody needs.

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
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


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
        raise ValueError("it was made from another state of its source")
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
            _write_lines(path, [json.dumps(header).encode() + b"\n", *lines], source.stat().st_mode & 0o666)
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


def _write_lines(path: Path, lines: list[bytes], mode: int) -> None:
    """A file that appears whole and on the disk, prepared in a hidden folder that no other process has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        with Path(folder, path.name).open("wb") as file:
            file.writelines(lines)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
