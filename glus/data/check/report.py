"""A check's outcome as a table for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glus.data.check.findings import Report, Row

MAX_LISTED = 5
"""Problems of a kind that are printed; the JSON file has all."""


def print_report(report: Report, console: Console) -> None:
    """A row for every check, then the problems by kind."""
    title = f"{report.dataset}: {report.layout} layout, split {report.split}, below {report.root}"
    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left")
    for column in ("check", "examined", "result"):
        table.add_column(column)
    for check, row in report.rows.items():
        table.add_row(check.value, escape(row.examined), _result(row))
    console.print(table)
    for check, row in report.rows.items():
        _print_list(console, f"[red]{_count(row.errors, 'error')}[/] {check.value}", row.errors)
        _print_list(console, f"[yellow]{_count(row.warnings, 'warning')}[/] {check.value}", row.warnings)


def _result(row: Row) -> str:
    found = []
    if row.errors:
        found.append(f"[red]{_count(row.errors, 'error')}[/]")
    if row.warnings:
        found.append(f"[yellow]{_count(row.warnings, 'warning')}[/]")
    if row.skipped:
        found.append(f"[dim]not checked: {escape(row.skipped)}[/]")
    return ", ".join(found) or "[green]ok[/]"


def _count(lines: list[str], noun: str) -> str:
    return f"{len(lines):,} {noun}{'' if len(lines) == 1 else 's'}"


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(title)
    for line in lines[:MAX_LISTED]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MAX_LISTED:
        console.print(f"  ... and {len(lines) - MAX_LISTED:,} more")
