"""What a scoring run says: typed results, a table for people, report.json and per_expression.csv for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

MAX_LISTED = 20
"""Problems and warnings printed at most; the files hold all of them."""


class Answer(Enum):
    """What was predicted for an expression over the whole video."""

    masks = "masks"
    empty = "empty"
    missing = "missing"


@dataclass(frozen=True)
class ExpressionScore:
    """The score of one expression."""

    video: str
    exp_id: str
    text: str
    group: str
    num_frames: int
    has_target: bool
    """Whether the expression names any object at all."""
    j: float
    """Mean region similarity over all frames, in [0, 1]; unreadable frames count 0."""
    f: float
    """Mean boundary accuracy over all frames, in [0, 1]; unreadable frames count 0."""
    answer: Answer
    """``masks``: some foreground; ``empty``: none in any frame; ``missing``: no frame could be read."""
    problems: tuple[str, ...] = ()
    """One line for each missing or unusable prediction."""
    is_counted: bool = True
    """False: left out of all means (``missing=drop``)."""

    @property
    def jf(self) -> float:
        """J&F, the mean of both."""
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class GroupScore:
    """Means over a set of expressions, each with weight 1; NaN where there is nothing to average."""

    num_expressions: int
    """Expressions in the means."""
    num_incomplete: int
    """Expressions with a missing or unusable prediction, whether counted or dropped."""
    j: float
    f: float
    no_target_accuracy: float
    """N-acc of MeViS v2: share of the expressions without an object that were answered with empty masks only."""
    target_accuracy: float
    """T-acc of MeViS v2: share of the expressions with an object that were answered with any foreground."""

    @property
    def jf(self) -> float:
        """J&F, the mean of both."""
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class Report:
    """The result of scoring one folder of predictions against one split."""

    dataset: str
    split: str
    predictions: str
    missing: str
    """The rule for missing predictions: a value of ``config.Missing``."""
    overall: GroupScore
    """Over all expressions."""
    groups: dict[str, GroupScore]
    """By ``Expression.group``, in order of first appearance; empty where the dataset has no groups."""
    expressions: tuple[ExpressionScore, ...]
    """In dataset order."""
    warnings: tuple[str, ...] = ()
    """Predictions that belong to no expression."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Every missing or unusable prediction, in dataset order."""
        return tuple(problem for score in self.expressions for problem in score.problems)


def summarize(scores: Sequence[ExpressionScore]) -> GroupScore:
    """Means over expressions, taken in the given order so that they do not depend on how the work was shared."""
    counted = [score for score in scores if score.is_counted]
    return GroupScore(
        num_expressions=len(counted),
        num_incomplete=sum(bool(score.problems) for score in scores),
        j=_mean(score.j for score in counted),
        f=_mean(score.f for score in counted),
        no_target_accuracy=_mean(score.answer is Answer.empty for score in counted if not score.has_target),
        target_accuracy=_mean(score.answer is Answer.masks for score in counted if score.has_target),
    )


def group_scores(scores: Sequence[ExpressionScore]) -> dict[str, GroupScore]:
    """``summarize`` for each group, in order of first appearance; nothing if no expression has a group."""
    names = list(dict.fromkeys(score.group for score in scores))
    if names == [""] or not names:
        return {}
    return {name: summarize([score for score in scores if score.group == name]) for name in names}


def print_report(report: Report, console: Console) -> None:
    """A table in percent with a line per group and one for all expressions; then problems and warnings."""
    table = Table(title=f"{report.dataset} ({report.split}), percent", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("group", no_wrap=True)
    for column in ("J", "F", "J&F", "N-acc", "T-acc", "num", "incomplete"):
        table.add_column(column, justify="right")
    for name, score in {**report.groups, "all expressions": report.overall}.items():
        percents = (score.j, score.f, score.jf, score.no_target_accuracy, score.target_accuracy)
        counts = (score.num_expressions, score.num_incomplete)
        table.add_row(escape(name or "(none)"), *map(percent, percents), *map(str, counts))
    console.print(table)
    _print_list(console, f"missing or unusable predictions (missing={report.missing})", report.problems, "red")
    _print_list(console, "predictions that belong to no expression, ignored", report.warnings, "yellow")


def write_report(report: Report, output_dir: Path) -> None:
    """Write report.json and per_expression.csv into ``output_dir``, each complete or not at all.

    Scores are in [0, 1]; a mean over nothing is null in JSON.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    summary = {
        "dataset": report.dataset,
        "split": report.split,
        "predictions": report.predictions,
        "missing": report.missing,
        "overall": _as_json(report.overall),
        "groups": {name: _as_json(score) for name, score in report.groups.items()},
        "problems": report.problems,
        "warnings": report.warnings,
    }
    write_text_atomically(output_dir / "report.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    rows = [
        {
            **asdict(score),
            "jf": score.jf,
            "answer": score.answer.value,
            "problems": "; ".join(score.problems),
        }
        for score in report.expressions
    ]
    write_text_atomically(output_dir / "per_expression.csv", csv_text(rows))


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    """Rows with equal keys as CSV with a header line; floats keep every digit, None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_text_atomically(path: Path, text: str) -> None:
    """Write beside ``path`` and rename, so that readers see the old file or the new one, never a half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def percent(value: float | None) -> str:
    """A share of 1 as percent with two decimals; "-" where there is no value."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _mean(values: Iterable[float]) -> float:
    numbers = np.array(list(values), dtype=np.float64)
    return float(np.mean(numbers)) if numbers.size else math.nan


def _as_json(score: GroupScore) -> dict[str, float | int | None]:
    values = {**asdict(score), "jf": score.jf}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _print_list(console: Console, title: str, lines: Sequence[str], style: str) -> None:
    if not lines:
        return
    console.print(f"[{style}]{len(lines)} {title}[/]")
    for line in lines[:MAX_LISTED]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MAX_LISTED:
        console.print(f"  ... and {len(lines) - MAX_LISTED} more: see report.json")
