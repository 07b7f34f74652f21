"""What a check of a dataset has found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Check(Enum):
    """What is checked, in the order of the table."""

    files = "files in their places"
    checksums = "SHA-256"
    counts = "published counts"
    sentences = "sentences and ids"
    leaks = "videos in other splits"
    frames = "frames there"
    pixels = "frames decode"
    sizes = "frames of one size"
    masks = "masks there"
    codes = "masks decode, fit frames"
    visible = "objects in sight"
    alignment = "masks on their objects"


@dataclass
class Row:
    """The outcome of one check."""

    examined: str = ""
    """What was looked at, in words: ``1,999 frames``."""
    skipped: str = ""
    """Why nothing was checked; empty if it was."""
    errors: list[str] = field(default_factory=list)
    """What is wrong, one line for each case, naming the place."""
    warnings: list[str] = field(default_factory=list)
    """What is legal but worth knowing."""


@dataclass
class Report:
    """The outcome of all checks of a split."""

    dataset: str
    layout: str
    split: str
    root: str
    rows: dict[Check, Row]

    @property
    def num_errors(self) -> int:
        """Over all checks."""
        return sum(len(row.errors) for row in self.rows.values())

    @property
    def num_warnings(self) -> int:
        """Over all checks."""
        return sum(len(row.warnings) for row in self.rows.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, with every problem; checks by their names."""
        head = {"dataset": self.dataset, "layout": self.layout, "split": self.split, "root": self.root}
        counts = {"num_errors": self.num_errors, "num_warnings": self.num_warnings}
        return head | counts | {"checks": {check.name: vars(row) for check, row in self.rows.items()}}
