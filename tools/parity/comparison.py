"""What a folder of recorded numbers holds, and one row for each of them that says how near ours comes."""

from __future__ import annotations

import json
import lzma
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glus.files import read_json, write_text


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

STYLES = {"pass": "", "fail": "red", "error": "red", "absent": "yellow"}
"""How a row may end. "error": it could not be compared. "absent": the folder does not hold it."""
UNREADABLE = (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class Record(dict[str, Any]):
    """Values by name; asking for one that is not there is an error that says where.

    Args:
        values: an object of JSON, the arrays of an ``.npz`` file, or what was replayed of a step.
        where: file (and entry), for messages.

    Raises:
        ValueError: ``values`` is no object.
    """

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object, found {type(values).__name__}")
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.where} has no {name!r}; it has {', '.join(self)}")


def read_record(path: Path) -> Record:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError, ValueError: see ``glus.files.read_json``; or it is no object.
    """
    return Record(read_json(path), str(path))


def read_records(path: Path) -> list[Record]:
    """The objects of a JSON file that holds a list of them; errors as for ``read_record``."""
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
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with np.load(path) as archive:
            return Record(dict(archive), str(path))
    except UNREADABLE as error:
        raise ValueError(f"{path} does not decode as .npz: {error}") from error


def unpack(bits: np.ndarray, width: int, what: str) -> np.ndarray:
    """bool masks (..., H, W) from ``np.packbits(axis=-1)`` of them, (..., H, ceil(W / 8)) uint8.

    Raises:
        ValueError: the last axis does not fit ``width``.
    """
    num_bytes = -(-width // 8)
    if bits.dtype != np.uint8 or bits.shape[-1] != num_bytes:
        raise ValueError(f"{what} are {bits.dtype} {bits.shape}; expected uint8, {num_bytes} bytes for {width} pixels")
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


@dataclass(frozen=True)
class Row:
    """One quantity of one case."""

    case: str
    quantity: str
    status: str
    """One of ``STYLES``."""
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


class Case:
    """Adds the rows of one case.

    Args:
        rows: gets them.
        name: how they call the case.
    """

    def __init__(self, rows: list[Row], name: str):
        self.rows = rows
        self.name = name

    def compare(
        self, quantity: str, ours: Any, recorded: Any, gate: Gate = EXACT, scale: Any = None, note: str = ""
    ) -> None:
        """A row for values that must be the same, in order, or near each other.

        Args:
            quantity: what they are.
            ours: of the replay: numbers, names or truth values, one or an array of them.
            recorded: same shape.
            gate: what passes.
            scale: what differences are relative to, broadcast over the values; default: the largest recorded one.
            note: stands in the row.
        """
        got, want = np.atleast_1d(ours), np.atleast_1d(recorded)
        if want.size == got.size == 0:
            self.absent(quantity, "nothing recorded: an empty list")
        elif got.shape != want.shape:
            self.error(quantity, f"replay has shape {got.shape}, recorded is {want.shape}")
        elif gate is EXACT:
            wrong = got != want
            self.count(quantity, int(wrong.sum()), wrong.size, note or _first_difference(got, want, wrong))
        else:
            self._compare_floats(quantity, got.astype(np.float64), want.astype(np.float64), gate, scale, note)

    def _compare_floats(
        self, quantity: str, got: np.ndarray, want: np.ndarray, gate: Gate, scale: Any, note: str
    ) -> None:
        if not np.isfinite(want).all():
            self.error(quantity, f"{int((~np.isfinite(want)).sum())} of {want.size} recorded values are not finite")
            return
        difference = np.abs(got - want)
        unit = np.abs(want).max() if scale is None else scale
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale of 0 allows no difference
            ratio = np.where(difference == 0, 0.0, difference / unit)
        absolute, relative = float(difference.max()), float(ratio.max())
        is_within = (absolute if gate.measure == "absolute" else relative) <= gate.limit  # False for nan
        self._add(quantity, "pass" if is_within else "fail", absolute, relative, *gate, want.size, note)

    def count(self, quantity: str, num_wrong: int, compared: int, note: str = "") -> None:
        """A row for ``compared`` values of which ``num_wrong`` are not what they should be."""
        if compared == 0:
            self.error(quantity, f"no value is left to compare{f': {note}' if note else ''}")
        else:
            status = "fail" if num_wrong else "pass"
            self._add(quantity, status, num_wrong, num_wrong / compared, *EXACT, compared, note)

    def holds(self, quantity: str, record: Record | None, name: str) -> bool:
        """Whether a value was recorded; if not, a row says that it is absent."""
        is_there = record is not None and record.get(name) is not None
        if not is_there:
            self.absent(quantity, f"{record.where} has no {name}" if record is not None else "its file is not there")
        return is_there

    def absent(self, quantity: str, note: str) -> None:
        """A row for what the folder does not hold."""
        self.rows.append(Row(self.name, quantity, "absent", note=note))

    def error(self, quantity: str, note: str) -> None:
        """A row for what cannot be compared."""
        self.rows.append(Row(self.name, quantity, "error", note=note))

    @contextmanager
    def errors_as_row(self, quantity: str) -> Iterator[None]:
        """Turn what stops a replay (a file that is missing or damaged, sizes that do not fit) into a row."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError, OSError, RuntimeError) as error:
            self.error(quantity, f"{type(error).__name__}: {error}")

    def _add(self, quantity: str, status: str, *numbers: Any) -> None:
        self.rows.append(Row(self.name, quantity, status, *numbers))


def count_rows(rows: Sequence[Row]) -> dict[str, int]:
    """Rows by status."""
    found = Counter(row.status for row in rows)
    return {status: found[status] for status in STYLES}


def is_met(rows: Sequence[Row]) -> bool:
    """Something was compared, and nothing fell short or could not be compared."""
    counts = count_rows(rows)
    return counts["pass"] > 0 and counts["fail"] == counts["error"] == 0


def print_table(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """One line per row, then the summary."""
    table = Table(title=folder.name, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("quantity")
    for column in ("absolute", "relative", "tolerance", "values"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("note")
    for previous, row in zip([None, *rows], rows, strict=False):
        table.add_row(
            "" if previous and row.case == previous.case else escape(row.case),
            escape(row.quantity),
            *_numbers(row),
            str(row.compared or ""),
            _shown(row.status),
            escape(row.note),
            style=STYLES[row.status],
        )
    console.print(table)
    console.print(f"{folder.name}: {_summary(rows)}", markup=False, highlight=False)


def write_rows(rows: Sequence[Row], folder: Path, path: Path) -> None:
    """The same as data; a number that is not finite is its name as a string. The file appears whole or not at all."""
    listed = [
        {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in row}
        for row in (asdict(row).items() for row in rows)
    ]
    content = {"folder": str(folder), "met": is_met(rows), "counts": count_rows(rows), "rows": listed}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _summary(rows: Sequence[Row]) -> str:
    counts = count_rows(rows)
    fell_short = counts["fail"] + counts["error"] > 0
    verdict = "met" if is_met(rows) else "NOT MET" if fell_short else "nothing was compared"
    return f"{verdict} ({', '.join(f'{number} {_shown(status)}' for status, number in counts.items())})"


def _shown(status: str) -> str:
    return status.upper() if status in ("fail", "error") else status


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
