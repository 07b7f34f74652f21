"""An ablation: rows that differ from each other by one thing, and what they are to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from glus.config.data import DatasetConfig, PathsConfig
from glus.config.loading import at_least, checked


class StartFrame(Enum):
    """The frame from which each sentence is followed."""

    first = "first"
    chosen = "chosen"
    """Its key frame, which the model chooses."""
    middle = "middle"
    """Of the video, for all sentences: what a choice has to be better than."""
    random = "random"
    """One frame for each sentence, drawn at random."""


@dataclass
class AblationRow:
    """One line of the table."""

    train: list[str] = field(default_factory=list)
    """Overrides of ``scripts/train.py``."""
    of: str | None = None
    """The row whose trained models it predicts with, instead of training some of its own."""
    predict: list[str] = field(default_factory=list)
    """Overrides of ``scripts/predict.py``."""
    start: StartFrame = StartFrame.first
    """Frame that sentences are followed from: ``first``, ``chosen`` by the model, ``middle`` or ``random``."""
    against: str | None = None
    """The row from which its differences are counted; null: none are."""


@dataclass
class AblationClaim:
    """What an ablation is to show, written down before it is run: one row is better than another on one kind."""

    worse: str = MISSING
    better: str = MISSING
    kind: str = MISSING
    """The kind of sentence that decides it; ``mean``: the mean over all kinds."""
    is_expected: bool = True
    """Whether the 95 % interval is to lie above 0; else the difference is reported, whatever it is."""


@dataclass
class AblationConfig:
    """``configs/ablation/*.yaml``."""

    start: list[str] = field(default_factory=list)
    """Overrides of ``scripts/train.py`` that train the model which all rows start from, where none is given."""
    train: list[str] = field(default_factory=list)
    """Overrides of all trainings, the start's included."""
    rows: dict[str, AblationRow] = checked(lambda rows: len(rows) > 0, "at least one row", default=dict)
    """By name, in the order of the table; a row that others are ``of`` or ``against`` stands before them."""
    claims: list[AblationClaim] = field(default_factory=list)
    """What the table is to show."""

    def __post_init__(self) -> None:
        known: set[str] = set()
        for name, row in self.rows.items():
            for other in (row.of, row.against):
                if other is not None and other not in known:
                    raise ValueError(
                        f"ablation.rows.{name}: no row {other!r} before it, only {', '.join(known) or '-'}"
                    )
            if row.of is not None and row.train:
                raise ValueError(f"ablation.rows.{name}: has models of {row.of}, so train={row.train} changes nothing")
            known.add(name)
        for claim in self.claims:
            for other in (claim.worse, claim.better):
                if other not in known:
                    raise ValueError(f"ablation.claims: no row {other!r}, only {', '.join(known)}")


@dataclass
class AblateConfig:
    """``scripts/ablate.py``."""

    ablation: AblationConfig = field(default_factory=AblationConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    output: str = MISSING
    """Folder of all runs, predictions and tables; the same command goes on with what is there."""
    start: str | None = None
    """Model folder that all rows start from; null: it is trained, from the towers below ``paths.weights``."""
    seeds: list[int] = checked(lambda seeds: len(seeds) > 0, "at least one seed", default=lambda: [0, 1, 2])
    """Of training; each row is trained once for each. The start has only one."""
    start_steps: int = at_least(1, default=600)
    """Training steps of the start."""
    steps: int = at_least(1, default=250)
    """Training steps of each row."""
    max_videos: int | None = at_least(1, default=None)
    """Only the first so many held-out videos; null: all."""
    processes: int = at_least(1, default=2)
    """Programs that run at a time. Any number of commands with the same ``output`` share the work besides."""
    gpus: int = at_least(0, default=0)
    """GPUs that they take in turn; 0: what each finds."""
    num_sentences: int = at_least(1, default=2)
    """Shown of each sort on the page: best, worst, most changed."""
