"""What a scoring run says: typed results, tables for people, report.json and CSV files for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glus.files import write_text

MAX_LISTED = 20
"""Problems and warnings printed at most; the files hold all of them."""
JSON_KEYS = (
    "dataset", "split", "predictions", "missing", "official_missing", "protocol", "num_videos",
    "num_videos_of_split", "mean_over_sentences", "mean_over_kinds", "groups", "tables", "problems", "unscorable",
    "num_unscored", "without_truth", "warnings", "doubts",
)  # fmt: skip
"""What report.json holds of a report, in this order; shares in percent."""
MEANS = {"mean_over_sentences": "mean over sentences", "mean_over_kinds": "mean over kinds"}
"""Both means by their key in files, and as tables call them: each sentence, or each kind of them, counts the same."""


class Answer(Enum):
    """What was predicted for an expression over the whole video."""

    masks = "masks"
    """Some foreground."""
    empty = "empty"
    """No foreground in any frame, and every frame was predicted."""
    missing = "missing"
    """No foreground, and in some frame no prediction that could be read."""


@dataclass(frozen=True)
class ExpressionScore:
    """The score of one expression."""

    video: str
    exp_id: str
    text: str
    group: str
    num_frames: int
    """Frames that are scored: those for which there is a ground truth."""
    has_target: bool
    """Whether the expression names any object at all."""
    j: float
    """Mean region similarity over all frames, in [0, 1]; unreadable frames count 0."""
    f: float
    """Mean boundary accuracy over all frames, in [0, 1]; unreadable frames count 0."""
    answer: Answer
    j_visible: float | None = None
    """Mean J over the frames in which an object is to be seen; None where there are none."""
    f_visible: float | None = None
    """The same for F."""
    false_positives: float | None = None
    """Share of the frames without an object that were answered with foreground; None where there are none."""
    measures: dict[str, float | None] = field(default_factory=dict)
    """What the benchmark's protocol measures besides, by name."""
    problems: tuple[str, ...] = ()
    """One line for each missing or unusable prediction."""
    is_counted: bool = True
    """False: left out of all means (``missing=drop``)."""

    @property
    def jf(self) -> float:
        """J&F, the mean of both."""
        return (self.j + self.f) / 2


@dataclass(frozen=True)
class ObjectScore:
    """The score of one object where a protocol scores objects (Ref-DAVIS17 A)."""

    video: str
    group: str
    object_id: int
    proposal: int
    """Which predicted id was assigned to it."""
    j: float
    f: float
    is_complete: bool
    """Whether every prediction that went into it could be read; if not, it is left out by ``missing=drop``."""


@dataclass(frozen=True)
class ScoreTable:
    """One of a benchmark's own tables."""

    name: str
    """Its key in report.json."""
    title: str
    rows: dict[str, dict[str, float]]
    """By row and column; shares of 1 are float, counts int, NaN where there is nothing to average."""
    note: str = ""
    """What a reader must know to compare it."""


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
    j_visible: float
    f_visible: float
    false_positives: float
    """Means over the expressions that have such frames."""
    jf: float
    """J&F, the mean of both."""
    jf_visible: float
    """J&F in the frames in which an object is to be seen."""


@dataclass(frozen=True)
class ScoreReport:
    """The result of scoring one folder of predictions against one split."""

    dataset: str
    split: str
    predictions: str
    missing: str
    """The rule for missing predictions: a value of ``config.Missing``."""
    official_missing: str | None
    """What the benchmark's own script does with a missing prediction; None where there is no such script."""
    protocol: str
    """What the means over expressions are."""
    num_videos: int
    """Fewer than ``num_videos_of_split`` with ``max_videos``."""
    num_videos_of_split: int
    expressions: tuple[ExpressionScore, ...]
    """In dataset order."""
    objects: tuple[ObjectScore, ...]
    tables: tuple[ScoreTable, ...]
    """The benchmark's own tables."""
    file_problems: tuple[str, ...]
    """Lines of RLE files that cannot be read."""
    num_unscored: int
    """Frames without ground truth, which are left out, summed over all expressions."""
    without_truth: tuple[str, ...]
    """Expressions whose ground truth has no frame: they are in no mean."""
    warnings: tuple[str, ...]
    """Predictions that belong to no expression."""
    doubts: tuple[str, ...] = ()
    """What kinds of masks may not be those that were meant, and how many there are of each."""
    unscorable: tuple[str, ...] = ()
    """Videos and sentences that are in no mean, since their frames or ground truth cannot be read."""

    @property
    def mean_over_sentences(self) -> GroupScore:
        """Over all expressions, each with weight 1."""
        return summarize(self.expressions)

    @property
    def mean_over_kinds(self) -> GroupScore | None:
        """Over the groups, each with weight 1; None where the dataset has no groups."""
        groups = [asdict(group) for group in self.groups.values()]
        if not groups:
            return None
        sums = {name: sum(group[name] for group in groups) for name in ("num_expressions", "num_incomplete")}
        return GroupScore(**{name: mean_of(no_nan(group[name]) for group in groups) for name in groups[0]} | sums)

    @property
    def groups(self) -> dict[str, GroupScore]:
        """By ``Expression.group``, in order of first appearance; empty where the dataset has no groups."""
        return {name: summarize(group) for name, group in by_group(self.expressions).items()}

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything in the predictions that is missing or unusable: files first, then in dataset order."""
        return (*self.file_problems, *(problem for score in self.expressions for problem in score.problems))


def summarize(scores: Sequence[ExpressionScore]) -> GroupScore:
    """Means over expressions, taken in the given order so that they do not depend on how the work was shared."""
    counted = [score for score in scores if score.is_counted]
    names = ("j", "f", "j_visible", "f_visible", "false_positives")
    means = {name: mean_of(getattr(score, name) for score in counted) for name in names}
    return GroupScore(
        num_expressions=len(counted),
        num_incomplete=sum(bool(score.problems) for score in scores),
        no_target_accuracy=mean_of(score.answer is Answer.empty for score in counted if not score.has_target),
        target_accuracy=mean_of(score.answer is Answer.masks for score in counted if score.has_target),
        jf=(means["j"] + means["f"]) / 2,
        jf_visible=(means["j_visible"] + means["f_visible"]) / 2,
        **means,
    )


def by_group(scores: Sequence[ExpressionScore]) -> dict[str, list[ExpressionScore]]:
    """The scores of each group, in order of first appearance; nothing if no expression has a group."""
    groups: dict[str, list[ExpressionScore]] = {}
    for score in scores:
        groups.setdefault(score.group, []).append(score)
    return {} if list(groups) == [""] else groups


def mean_of(values: Iterable[float | None]) -> float:
    """Mean of the values that exist, in the given order; NaN if there are none, or if one is."""
    numbers = np.array([value for value in values if value is not None], np.float64)
    return float(np.mean(numbers)) if numbers.size else math.nan


Mean = Callable[[Iterable[float | None]], float]


def no_nan(value: float) -> float | None:
    """None for NaN: a mean over nothing, which does not count in a mean of means."""
    return None if math.isnan(value) else value


def mean_jf(scores: Sequence[ExpressionScore | ObjectScore], mean: Mean = mean_of) -> dict[str, float]:
    """The columns J, F and J&F of a row of a benchmark's table."""
    j, f = mean(score.j for score in scores), mean(score.f for score in scores)
    return {"J": j, "F": f, "J&F": (j + f) / 2}


def print_report(report: ScoreReport, console: Console) -> None:
    """Tables in percent: one with a line per group and one for all expressions, then the benchmark's own; then
    problems and warnings."""
    rows = {
        name or "(none)": {
            "J": s.j, "F": s.f, "J&F": s.jf, "J&F seen": s.jf_visible, "false pos.": s.false_positives,
            "N-acc": s.no_target_accuracy, "T-acc": s.target_accuracy,
            "num": s.num_expressions, "bad": s.num_incomplete,
        }
        for name, s in rows_of(report).items()
    }  # fmt: skip
    note = (
        "J&F seen: over frames with an object. false pos.: frames without an object that were answered with "
        "foreground. N-acc, T-acc: expressions without / with an object that were answered with nothing / something. "
        "bad: expressions with a missing or unusable prediction."
    )
    title = f"{report.dataset} ({report.split}), percent. {report.protocol}"
    own = [(f"{table.title}, percent", table.rows, table.note) for table in report.tables]
    for heading, cells, text in [(title, rows, note), *own]:
        print_rows(console, heading, "kind", {name: percents(row) for name, row in cells.items()})
        if text:
            console.print(f"{text}\n", markup=False, highlight=False)
    if report.num_videos < report.num_videos_of_split:
        console.print(f"[yellow]{_part(report.num_videos, report.num_videos_of_split)}[/]", highlight=False)
    _print_list(console, f"missing or unusable predictions (missing={report.missing})", report.problems, "red")
    if report.problems and report.official_missing is not None:
        console.print(f"the official script: {report.official_missing}", markup=False, highlight=False)
    title = "videos or sentences whose frames or ground truth cannot be read, not scored"
    _print_list(console, title, report.unscorable, "red")
    if report.num_unscored:
        console.print(
            f"[yellow]{report.num_unscored} frames without ground truth (over all expressions), not scored[/]"
        )
    _print_list(console, "expressions without ground truth, not scored", report.without_truth, "yellow")
    _print_list(console, "predictions that belong to nothing, ignored", report.warnings, "yellow")
    for doubt in report.doubts:
        console.print(f"warning: {doubt}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def left_out(report: Mapping[str, Any]) -> list[str]:
    """What keeps the means of a report.json, maybe an older one, from being those of the whole split."""
    lines = []
    if num_unscorable := len(report.get("unscorable", ())):
        lines.append(f"{num_unscorable} videos or sentences could not be scored (unscorable in report.json)")
    chosen, of_split = report.get("num_videos", 0), report.get("num_videos_of_split", 0)
    if chosen < of_split:
        lines.append(_part(chosen, of_split))
    return lines


def _part(chosen: int, of_split: int) -> str:
    return f"only {chosen} of the split's {of_split} videos were scored (max_videos)"


def rows_of(report: ScoreReport) -> dict[str, GroupScore]:
    """Groups in the order of their first sentences, then the means over all sentences and over the groups."""
    means = {title: getattr(report, name) for name, title in MEANS.items()}
    return {**report.groups, **{title: score for title, score in means.items() if score is not None}}


def print_rows(console: Console, title: str, name: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Rows of cells by the name of the row, whose column is called ``name``, and that of the column.

    Names of columns wrap where the console is narrow, cells never.
    """
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(name, no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(escape(column), justify="right", min_width=max(len(row[column]) for row in rows.values()))
    for label, row in rows.items():
        table.add_row(escape(label), *map(escape, row.values()))
    console.print(table)


def write_report(report: ScoreReport, output_dir: Path) -> list[Path]:
    """Write report.json, per_expression.csv and, where objects are scored, per_object.csv into ``output_dir``.

    Each file is complete or absent, and report.json, the last, holds a hash of per_expression.csv. Means, in JSON, are
    in percent (null over nothing); the scores that they are made of, in CSV, in [0, 1].

    Returns:
        The paths.
    """
    summary, scores, objects = (output_dir / name for name in ("report.json", "per_expression.csv", "per_object.csv"))
    write_text(scores, csv_text([_as_row(score) for score in report.expressions]))
    if report.objects:
        write_text(objects, csv_text([asdict(score) for score in report.objects]))
    else:
        objects.unlink(missing_ok=True)  # of another protocol
    content = {**_as_json(report), "per_expression_sha256": sha256(scores.read_bytes()).hexdigest()}
    write_text(summary, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return [summary, scores, *([objects] if report.objects else [])]


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    """Rows with equal keys as CSV with a header line; floats keep every digit, None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])  # its \r\n has it quote a single one, too
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_json(report: ScoreReport) -> dict[str, object]:
    means = {
        **{name: getattr(report, name) and asdict(getattr(report, name)) for name in MEANS},
        "groups": {name: asdict(score) for name, score in report.groups.items()},
        "tables": {
            table.name: {"title": table.title, "note": table.note, "rows": table.rows} for table in report.tables
        },
    }
    return {name: _percent(means[name] if name in means else getattr(report, name)) for name in JSON_KEYS}


def _percent(value: Any) -> Any:
    """Shares of 1 in percent, also within dicts, and None in the place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _percent(item) for name, item in value.items()}
    return (None if math.isnan(value) else 100 * value) if isinstance(value, float) else value


def _as_row(score: ExpressionScore) -> dict[str, object]:
    values = asdict(score)
    measures = values.pop("measures")
    del values["problems"]  # in report.json; all of them make a cell that is too long for csv
    num_problems = len(score.problems)
    return {**values, "jf": score.jf, "answer": score.answer.value, "num_problems": num_problems, **measures}


def percents(row: Mapping[str, float]) -> dict[str, str]:
    """Shares of 1 in percent with two decimals, counts as they are; "-" where there is no value."""
    return {
        name: str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{100 * value:.2f}"
        for name, value in row.items()
    }


def _print_list(console: Console, title: str, lines: Sequence[str], style: str) -> None:
    if not lines:
        return
    console.print(f"[{style}]{len(lines)} {title}[/]")
    for line in lines[:MAX_LISTED]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MAX_LISTED:
        console.print(f"  ... and {len(lines) - MAX_LISTED} more: see report.json")
