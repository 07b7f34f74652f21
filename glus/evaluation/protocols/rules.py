"""What a benchmark may add to J and F of every expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glus.config import DatasetConfig
from glus.evaluation.measured import Chunk, Measured, Observed
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable

Observe = Callable[[Chunk], Observed]


def _no_measures(_: Measured) -> dict[str, float | None]:
    return {}


def _no_objects(_: Sequence[Measured]) -> list[ObjectScore]:
    return []


def _no_tables(_scores: Sequence[ExpressionScore], _objects: Sequence[ObjectScore]) -> list[ScoreTable]:
    return []


@dataclass(frozen=True)
class Rules:
    """One protocol, as functions that a scoring run calls in this order; each is left out where it is not needed."""

    title: str
    """What the table of all expressions is called; it holds the mean J and F of this protocol."""
    is_ignoring: bool = False
    """Whether pixels whose truth is unknown (``MaskStore.ignore``) are taken out of both masks first."""
    open_observer: Callable[[DatasetConfig], Observe] | None = None
    """Opens what the benchmark needs beside predictions and ground truth; its result sees every chunk of frames."""
    measure: Callable[[Measured], dict[str, float | None]] = _no_measures
    """Further measures of an expression by name; None where one does not exist."""
    match: Callable[[Sequence[Measured]], list[ObjectScore]] = _no_objects
    """Scores of the objects of a video, from all its expressions."""
    tables: Callable[[Sequence[ExpressionScore], Sequence[ObjectScore]], list[ScoreTable]] = _no_tables
    """The benchmark's own tables, from everything that is counted (``missing=drop`` is applied before)."""
