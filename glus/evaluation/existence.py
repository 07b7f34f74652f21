"""Whether what a sentence describes is to be seen at all: what each threshold on that would make of predictions.

A threshold only empties masks (``inference.existence_threshold``), so one prediction without it tells exactly what
every threshold gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from glus.data.predictions import read_answers
from glus.evaluation.report import ScoreTable, mean_of
from glus.files import read_object
from glus.types import Expression


@dataclass(frozen=True)
class Undecided:
    """The scored frames of an expression, T of them, each with its mask and with an empty one in its place."""

    has_target: bool
    existence_T: np.ndarray
    """In [0, 1]: probability of [SEG] times object score."""
    kept_T: np.ndarray
    """J&F of the mask."""
    emptied_T: np.ndarray
    """J&F of the empty one."""
    answered_T: np.ndarray
    """bool: the mask has foreground."""

    @property
    def highest(self) -> float:
        """Existence up to which a threshold leaves any foreground; -1 if there is none to begin with."""
        return float(self.existence_T[self.answered_T].max(initial=-1))


@dataclass(frozen=True)
class Decision:
    """What a threshold makes of predictions; NaN where there is nothing to average."""

    threshold: float
    jf: float
    """J&F over all expressions."""
    n_acc: float
    """Share of the expressions without an object that get no foreground."""
    t_acc: float
    """Share of the expressions with an object that get some."""

    @property
    def final(self) -> float:
        """The mean of those that exist: the Final of MeViS v2, whose J&F counts the expressions without an object."""
        return mean_of((self.jf, self.n_acc, self.t_acc))

    def row(self) -> dict[str, float]:
        """Of a table."""
        return {"J&F": self.jf, "N-acc": self.n_acc, "T-acc": self.t_acc, "Final": self.final}


class Thresholds:
    """What every threshold makes of some expressions.

    Args:
        expressions: at least one.
    """

    def __init__(self, expressions: Sequence[Undecided]):
        existence = np.concatenate([one.existence_T for one in expressions])
        gains = np.concatenate([(one.emptied_T - one.kept_T) / len(one.kept_T) for one in expressions])
        order = np.argsort(existence, kind="stable")
        self._levels = existence[order]
        kept = sum(float(np.mean(one.kept_T)) for one in expressions)
        self._jf = (kept + np.concatenate([[0.0], np.cumsum(gains[order])])) / len(expressions)
        self._highest = [
            np.sort([one.highest for one in expressions if one.has_target is kind]) for kind in (False, True)
        ]

    def at(self, thresholds_K: Sequence[float] | np.ndarray) -> list[Decision]:
        """What each comes to."""
        jf_K = self._jf[np.searchsorted(self._levels, thresholds_K)]
        n_acc_K, missed_K = (
            np.searchsorted(highest, thresholds_K) / (len(highest) or np.nan) for highest in self._highest
        )
        columns = (np.asarray(values_K).tolist() for values_K in (thresholds_K, jf_K, n_acc_K, 1 - missed_K))
        return [Decision(*values) for values in zip(*columns, strict=True)]

    @cached_property
    def best(self) -> Decision:
        """The lowest of highest Final, so that no mask is emptied for nothing."""
        levels = np.unique(np.append(self._levels, 1.0))
        return max(self.at(np.append(0.0, (levels[1:] + levels[:-1]) / 2)), key=lambda decision: decision.final)


def existence_table(thresholds: Thresholds, threshold: float) -> ScoreTable:
    """Predictions without and with a threshold."""
    names, decisions = ("as predicted", f"existence_threshold={threshold:g}"), thresholds.at([0.0, threshold])
    rows = {name: decision.row() for name, decision in zip(names, decisions, strict=True)}
    note = "Masks emptied where P([SEG]) times object score is below. Final: the mean of those that exist."
    return ScoreTable("existence", "Existence decision", rows, note)


def check_undecided(folder: Path) -> None:
    """Raise ValueError where predictions were made with a threshold, which cannot be undone."""
    made_by = read_object(folder / "predict.json") if (folder / "predict.json").is_file() else {}
    threshold = made_by.get("identity", {}).get("inference", {}).get("existence_threshold")
    if threshold:
        raise ValueError(
            f"{folder}: these predictions were made with inference.existence_threshold={threshold}, so masks are "
            "emptied already; predict without it into another folder"
        )


def read_existence(folder: Path, expression: Expression) -> np.ndarray:
    """(T,) in [0, 1], of all frames.

    Raises:
        FileNotFoundError, ValueError: the predictions hold no such values.
    """
    answers = read_answers(folder, expression)
    if any("object_score" not in answer for answer in answers):
        raise ValueError(f"{folder}: {expression.name} is predicted without object scores; predict it anew")
    return np.array([answer["score"] * answer["object_score"] for answer in answers])
