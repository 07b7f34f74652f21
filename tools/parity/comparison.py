"""What a folder of recorded numbers holds, and one row for each quantity that says how near ours comes."""

from __future__ import annotations

import json
import logging
import lzma
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from glus.files import read_json, read_object, write_text

log = logging.getLogger(__name__)


class Gate(NamedTuple):
    """The largest difference of a row that passes.

    All are the last column of the table in the README of the parity fixtures (``tests/parity/recorded/README.md``), for
    float32 on a CPU. They bound float noise, not behaviour: what is wrong by design is off by far more.
    """

    limit: float
    measure: str = "relative"
    """"relative" or "absolute": which of a row's two differences is bounded. "equal": none may be."""


EXACT = Gate(0, "equal")
SEG_EMBEDDING = Gate(5e-5)
MASK_LOGITS = Gate(5e-5)
"""Relative to the range of the frame's logits."""
PREDICTED_IOU = Gate(1e-5)
PROBE = Gate(1e-5)
CLIP_INPUT = Gate(1e-6, "absolute")
SAM2_INPUT = Gate(1e-5, "absolute")
STABILITY = Gate(1e-3, "absolute")
"""A ratio of pixel counts: one pixel more moves it."""
LOSS = Gate(1e-5)
GRADIENT_TOTAL = Gate(1e-3)
"""The gates of gradients are wide because float noise can flip a ReLU of the mask decoder."""
GRADIENT_GROUP = Gate(5e-3)
GRADIENT_TENSOR = Gate(1e-2)
GRADIENT_NEGLIGIBLE = 1e-6
"""Share of the total norm up to which a tensor's gradient is float noise."""
GRADIENT_NOISE = Gate(1e-6)
"""Norm of such a tensor, relative to the total."""
GRADIENT_VALUES = Gate(3e-2)

STATUSES = {"pass": ("pass", ""), "fail": ("FAIL", "red"), "error": ("ERROR", "red"), "absent": ("absent", "yellow")}
"""How a row may end, as it is shown and in which colour. "error": it could not be compared."""
UNDECODABLE = (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class NotRecorded(Exception):
    """The folder does not hold something; nothing is wrong."""


class Record(dict[str, Any]):
    """Values by name; asking for one that is not there is an error that says where.

    Args:
        values: an object of JSON, the arrays of an ``.npz`` file, or what was replayed of a step.
        where: file (and entry), for messages.

    Raises:
        ValueError: ``values`` is no object.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: expected an object, found {type(values).__name__}")
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.where} has no {name!r}; it has {', '.join(self)}")

    def part(self, name: str) -> Record:
        """An object within this one."""
        return Record(self[name], f"{self.where}: {name}")

    def optional(self, name: str) -> Any:
        """A value that need not have been recorded.

        Raises:
            NotRecorded: it was not.
        """
        if self.get(name) is None:
            raise NotRecorded(f"{self.where} has no {name}")
        return self[name]


def read_record(path: Path) -> Record:
    """The object that a JSON file holds; errors as for ``glus.files.read_object``."""
    return Record(read_object(path), str(path))


def read_records(path: Path) -> list[Record]:
    """The objects of a JSON file that holds a list of them.

    Raises:
        FileNotFoundError, ValueError: see ``glus.files.read_json``; or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list, found {type(content).__name__}")
    return [Record(entry, f"{path}: entry {number}") for number, entry in enumerate(content)]


def read_arrays(path: Path) -> Record:
    """All arrays of an ``.npz`` file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not decode.
    """
    try:
        with np.load(path) as archive:
            return Record(archive, str(path))
    except UNDECODABLE as error:
        raise ValueError(f"{path} does not decode as .npz: {error}") from error


def unpack(bits: np.ndarray, width: int, what: str) -> np.ndarray:
    """bool masks (..., H, W) from ``np.packbits(axis=-1)`` of them, (..., H, ceil(W / 8)) uint8.

    Raises:
        ValueError: the last axis does not fit ``width``.
    """
    num_bytes = -(-width // 8)
    if bits.shape[-1] != num_bytes:
        raise ValueError(f"{what} are {bits.shape}; expected {num_bytes} bytes for {width} pixels")
    return np.unpackbits(bits, axis=-1, count=width).astype(bool)


def thin_out(values: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Every nth row and column of maps (..., m, m), so many as were recorded; other arrays as they are.

    Raises:
        ValueError: no n gives that.
    """
    if values.ndim < 3:
        return values
    full, side = values.shape[-1], recorded.shape[-1]
    if side < 1 or full % side:
        raise ValueError(f"recorded maps have side {side}; expected a divisor of {full}")
    return values[..., :: full // side, :: full // side]


def map_range(logits: np.ndarray) -> np.ndarray:
    """Largest minus smallest value of each map (..., m, m): (..., 1, 1)."""
    return np.ptp(logits, axis=(-2, -1), keepdims=True)


@dataclass
class Row:
    """One quantity of one case."""

    case: str
    quantity: str
    status: str = ""
    """One of ``STATUSES``; empty until something was compared."""
    absolute: float | None = None
    """Largest absolute difference; for a quantity that must be equal, how many values differ."""
    relative: float | None = None
    """Largest difference relative to the quantity's scale; for one that must be equal, the share that differs."""
    tolerance: float | None = None
    measure: str | None = None
    """``Gate.measure``; this and all before it are None where nothing was compared."""
    compared: int = 0
    """Number of values compared."""
    note: str = ""

    def compare(self, ours: Any, recorded: Any, gate: Gate = EXACT, scale: Any = None, note: str = "") -> None:
        """Values that must be the same, in order, or near each other.

        Args:
            ours: of the replay: numbers, names or truth values, one or an array of them.
            recorded: same shape.
            gate: what passes.
            scale: what differences are relative to, broadcast over the values; default: the largest recorded one.
            note: stands in the row.

        Raises:
            NotRecorded: neither has a value.
            ValueError: shapes differ, or a number that is to be near was recorded as none.
        """
        got, want = np.atleast_1d(ours), np.atleast_1d(recorded)
        if want.size == got.size == 0:
            raise NotRecorded("nothing recorded: an empty list")
        if got.shape != want.shape:
            raise ValueError(f"replay has shape {got.shape}, recorded is {want.shape}")
        if gate is EXACT:
            wrong = got != want
            self.count(int(wrong.sum()), wrong.size, note or _first_difference(got, want, wrong))
            return
        got, want = got.astype(np.float64), want.astype(np.float64)
        if not np.isfinite(want).all():
            raise ValueError(f"{int((~np.isfinite(want)).sum())} of {want.size} recorded values are not finite")
        difference = np.abs(got - want)
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale of 0 allows no difference
            ratio = difference / (np.abs(want).max() if scale is None else scale)
        ratio = np.where(difference == 0, 0.0, ratio)
        self._judge(float(difference.max()), float(ratio.max()), gate, want.size, note)

    def compare_each(
        self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], gate: Gate, note: str, floor: float = 0.0
    ) -> None:
        """Arrays of ours beside others, each pair relative to its largest value, which counts as at least ``floor``."""
        parts = []
        for ours, recorded in pairs:
            part = Row(self.case, self.quantity)
            part.compare(ours, recorded, gate, max(floor, np.abs(recorded).max()))
            parts.append((part.absolute, part.relative, part.compared))
        absolute, relative, compared = np.array(parts).T
        self._judge(float(absolute.max()), float(relative.max()), gate, int(compared.sum()), note)

    def count(self, num_wrong: int, compared: int, note: str = "") -> None:
        """``compared`` values, of which ``num_wrong`` are not what they should be.

        Raises:
            ValueError: there is no value.
        """
        if compared == 0:
            raise ValueError(f"no value is left to compare{f': {note}' if note else ''}")
        self._judge(num_wrong, num_wrong / compared, EXACT, compared, note)

    def _judge(self, absolute: float, relative: float, gate: Gate, compared: int, note: str) -> None:
        self.absolute, self.relative, self.compared, self.note = absolute, relative, compared, note
        self.tolerance, self.measure = gate
        is_within = (relative if gate.measure == "relative" else absolute) <= gate.limit  # False for nan
        self.status = "pass" if is_within else "fail"


class Case:
    """Adds the rows of one case.

    Args:
        rows: gets them.
        name: how they call the case.
    """

    def __init__(self, rows: list[Row], name: str):
        log.info("comparing: %s", name)
        self.rows = rows
        self.name = name

    @contextmanager
    def row(self, quantity: str) -> Iterator[Row]:
        """A row for the block to fill; what stops the block (a file that is missing or damaged, sizes that do not fit)
        stands in it. A block that neither fills it nor stops, as one around other rows, adds none."""
        row = Row(self.name, quantity)
        try:
            yield row
        except NotRecorded as reason:
            row.status, row.note = "absent", str(reason)
        except (ValueError, TypeError, AttributeError, LookupError, OSError, RuntimeError) as error:
            row.status, row.note = "error", f"{type(error).__name__}: {error}"
        if row.status:
            self.rows.append(row)

    def compare(
        self, quantity: str, ours: Any, recorded: Any, gate: Gate = EXACT, scale: Any = None, note: str = ""
    ) -> None:
        """A row of ``Row.compare`` alone."""
        with self.row(quantity) as row:
            row.compare(ours, recorded, gate, scale, note)

    def count(self, quantity: str, num_wrong: int, compared: int, note: str = "") -> None:
        """A row of ``Row.count`` alone."""
        with self.row(quantity) as row:
            row.count(num_wrong, compared, note)

    def absent(self, quantity: str, note: str) -> None:
        """A row for what the folder does not hold."""
        self.rows.append(Row(self.name, quantity, "absent", note=note))

    def error(self, quantity: str, note: str) -> None:
        """A row for what cannot be compared."""
        self.rows.append(Row(self.name, quantity, "error", note=note))


def count_rows(rows: Sequence[Row]) -> dict[str, int]:
    """Rows by status."""
    found = Counter(row.status for row in rows)
    return {status: found[status] for status in STATUSES}


def is_met(rows: Sequence[Row]) -> bool:
    """Something was compared, and nothing fell short or could not be compared."""
    counts = count_rows(rows)
    return counts["pass"] > 0 and counts["fail"] == counts["error"] == 0


def print_table(rows: Sequence[Row], title: str, console: Console) -> None:
    """One line per row, then the summary."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("absolute", "relative", "tolerance", "values")]
    columns = (Column("case", no_wrap=True), Column("quantity"), *numbers, Column(no_wrap=True), Column("note"))
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        shown, colour = STATUSES[row.status]
        cells = (row.case, row.quantity, *_numbers(row), str(row.compared or ""), shown, row.note)
        table.add_row(*map(escape, cells), style=colour)
    console.print(table)
    counts = count_rows(rows)
    verdict = "met" if is_met(rows) else "NOT MET" if counts["fail"] + counts["error"] else "nothing was compared"
    listed = ", ".join(f"{number} {STATUSES[status][0]}" for status, number in counts.items())
    console.print(f"{title}: {verdict} ({listed})", markup=False, highlight=False)


def write_rows(rows: Sequence[Row], about: dict[str, str], path: Path) -> None:
    """The same as data, after what it is ``about``; a number that is not finite is its name as a string.

    The file appears whole or not at all.
    """
    listed = [
        {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in row}
        for row in (asdict(row).items() for row in rows)
    ]
    content = {**about, "met": is_met(rows), "counts": count_rows(rows), "rows": listed}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _numbers(row: Row) -> tuple[str, str, str]:
    """Differences and tolerance as text."""
    if row.measure is None:
        return "", "", ""
    if row.measure == EXACT.measure:
        return f"{row.absolute}", f"{row.relative:.1e}" if row.relative else "0", "=="
    return f"{row.absolute:.1e}", f"{row.relative:.1e}", f"{row.tolerance:.0e} {row.measure[:3]}"


def _first_difference(got: np.ndarray, want: np.ndarray, wrong: np.ndarray) -> str:
    if not wrong.any():
        return ""
    where = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"first at {where[0] if len(where) == 1 else where}: replay {got[where]}, recorded {want[where]}"
