"""What a replay found: one row per quantity, a table for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glus.files import write_text
from tools.parity.gates import Gate, Measure


class Status(Enum):
    """How a row ended."""

    passed = "pass"
    failed = "FAIL"
    error = "ERROR"
    """It could not be compared: shapes differ, a file does not decode, a value has no counterpart."""
    absent = "absent"
    """The folder does not hold it."""


@dataclass(frozen=True)
class Row:
    """One quantity of one case."""

    case: str
    quantity: str
    status: Status
    absolute: float | None = None
    """Largest absolute difference; for a quantity that must be equal, how many values differ."""
    relative: float | None = None
    """Largest difference relative to the quantity's scale; for one that must be equal, the share that differs."""
    gate: Gate | None = None
    """None: must be equal (or nothing was compared)."""
    compared: int = 0
    """Number of values compared."""
    note: str = ""

    @property
    def tolerance(self) -> str:
        """The gate as text."""
        if self.status in (Status.absent, Status.error):
            return ""
        return "==" if self.gate is None else f"{self.gate.limit:.0e} {self.gate.measure.value[:3]}"


class Case:
    """The rows of one case, as they are found.

    Args:
        name: how rows call it.
        rows: gets them.
    """

    def __init__(self, name: str, rows: list[Row]):
        self.name = name
        self._rows = rows

    def equal(self, quantity: str, ours: Sequence | np.ndarray, recorded: Sequence | np.ndarray) -> None:
        """A row for values that must be the same, in order: numbers, names or truth values."""
        got, want = np.asarray(ours), np.asarray(recorded)
        if want.size == 0 and got.size == 0:
            self.absent(quantity, "nothing recorded: an empty list")
        elif got.shape != want.shape:
            self.error(quantity, f"replay has shape {got.shape}, recorded is {want.shape}")
        else:
            wrong = got != want
            self.differing(quantity, int(wrong.sum()), wrong.size, _first_difference(got, want, wrong))

    def differing(self, quantity: str, count: int, compared: int, note: str = "") -> None:
        """A row for ``compared`` values of which ``count`` are not what they should be."""
        if compared == 0:
            self.error(quantity, f"no value is left to compare{f': {note}' if note else ''}")
            return
        status = Status.failed if count else Status.passed
        self._rows.append(Row(self.name, quantity, status, count, count / compared, None, compared, note))

    def close(
        self,
        quantity: str,
        ours: np.ndarray | Sequence[float],
        recorded: np.ndarray | Sequence[float],
        gate: Gate,
        scale: np.ndarray | float | None = None,
        note: str = "",
    ) -> None:
        """A row for values that may differ by float noise.

        Args:
            quantity: what they are.
            ours: of the replay.
            recorded: same shape.
            gate: what passes.
            scale: what differences are relative to, broadcast over the values; default: the largest recorded one.
            note: stands in the row.
        """
        got, want = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if want.size == 0 and got.size == 0:
            self.absent(quantity, "nothing recorded: an empty array")
        elif got.shape != want.shape:
            self.error(quantity, f"replay has shape {got.shape}, recorded is {want.shape}")
        elif not np.isfinite(want).all():
            self.error(quantity, f"{int((~np.isfinite(want)).sum())} of {want.size} recorded values are not finite")
        else:
            difference = np.abs(got - want)
            unit = np.abs(want).max() if scale is None else np.asarray(scale, np.float64)
            self.bounded(quantity, difference.max(), _ratio(difference, unit).max(), gate, want.size, note)

    def bounded(
        self, quantity: str, absolute: float, relative: float, gate: Gate, compared: int, note: str = ""
    ) -> None:
        """A row for differences that are known already; one that is not a number fails."""
        value = absolute if gate.measure is Measure.absolute else relative
        status = Status.passed if value <= gate.limit else Status.failed
        self._rows.append(Row(self.name, quantity, status, float(absolute), float(relative), gate, compared, note))

    def absent(self, quantity: str, note: str) -> None:
        """A row for what the folder does not hold."""
        self._rows.append(Row(self.name, quantity, Status.absent, note=note))

    def error(self, quantity: str, note: str) -> None:
        """A row for what cannot be compared."""
        self._rows.append(Row(self.name, quantity, Status.error, note=note))

    @contextmanager
    def errors_as_row(self, quantity: str) -> Iterator[None]:
        """Turn what stops a replay (a file that is missing or damaged, sizes that do not fit) into a row."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, LookupError) as error:
            self.error(quantity, f"{type(error).__name__}: {error}")


class Report:
    """All rows of one folder.

    Args:
        folder: what was replayed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[Row] = []

    def case(self, name: str) -> Case:
        """Rows of this case go to the report."""
        return Case(name, self.rows)

    @property
    def counts(self) -> dict[Status, int]:
        """Rows by status."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in Status}

    @property
    def is_met(self) -> bool:
        """Something was compared, and nothing fell short or could not be compared."""
        counts = self.counts
        return counts[Status.passed] > 0 and counts[Status.failed] == counts[Status.error] == 0

    @property
    def summary(self) -> str:
        """One line."""
        counts = self.counts
        fell_short = counts[Status.failed] + counts[Status.error] > 0
        verdict = "met" if self.is_met else "NOT MET" if fell_short else "nothing was compared"
        parts = ", ".join(f"{number} {status.value}" for status, number in counts.items())
        return f"{self.folder.name}: {verdict} ({parts})"


def print_table(report: Report, console: Console) -> None:
    """One line per row, then the summary."""
    table = Table(title=str(report.folder.name), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("quantity")
    for column in ("absolute", "relative", "tolerance", "values"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("note")
    styles = {Status.failed: "red", Status.error: "red", Status.absent: "yellow", Status.passed: ""}
    last = None
    for row in report.rows:
        is_exact = row.gate is None
        table.add_row(
            escape(row.case) if row.case != last else "",
            escape(row.quantity),
            _cell(row.absolute, is_exact),
            _cell(row.relative, is_exact and row.relative == 0),
            row.tolerance,
            str(row.compared or ""),
            row.status.value,
            escape(row.note),
            style=styles[row.status],
        )
        last = row.case
    console.print(table)
    console.print(report.summary, markup=False, highlight=False)


def write_json(report: Report, path: Path) -> None:
    """The same as data; a number that is not finite is its name as a string. The file appears whole or not at all."""
    content = {
        "folder": str(report.folder),
        "met": report.is_met,
        "counts": {status.value.lower(): number for status, number in report.counts.items()},
        "rows": [
            {
                "case": row.case,
                "quantity": row.quantity,
                "status": row.status.value.lower(),
                "absolute": _finite(row.absolute),
                "relative": _finite(row.relative),
                "tolerance": row.gate.limit if row.gate else 0 if row.tolerance else None,
                "measure": row.gate.measure.value if row.gate else "equal" if row.tolerance else None,
                "compared": row.compared,
                "note": row.note,
            }
            for row in report.rows
        ],
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _ratio(difference: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Relative differences; 0 where nothing differs, infinite where something does though the scale is 0."""
    difference, unit = np.broadcast_arrays(difference, scale)
    ratio = np.where(difference == 0, 0.0, np.inf)
    np.divide(difference, unit, out=ratio, where=unit != 0)
    return ratio


def _first_difference(got: np.ndarray, want: np.ndarray, wrong: np.ndarray) -> str:
    if not wrong.any():
        return ""
    where = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = where[0] if len(where) == 1 else where
    return f"first at {place}: replay {got[where]}, recorded {want[where]}"


def _cell(value: float | None, as_count: bool) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if as_count else f"{value:.1e}"


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
