"""Scoring and comparing predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from glus.config.data import DatasetConfig, PathsConfig
from glus.config.loading import check_max_videos, require


class Missing(Enum):
    """What a missing prediction does to a score."""

    zero = "zero"
    drop = "drop"
    error = "error"


@dataclass
class ScoreConfig:
    """``scripts/score.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    predictions: str = MISSING
    """Folder of ``<video>/<exp_id>/<frame>.png`` (any non-zero pixel is foreground) or of ``<video>.jsonl``."""
    missing: Missing = Missing.zero
    """A missing prediction scores 0 and is listed, is dropped from the mean, or is an error."""
    num_workers: int = 2
    """Scoring processes; scores do not depend on it."""
    output: str | None = None
    """Folder for report.json and per_expression.csv; default: ``predictions``."""
    max_videos: int | None = None
    """Only the first so many videos, as ``predict.py max_videos``; null: all."""

    def __post_init__(self) -> None:
        _check_scoring(self.num_workers, self.max_videos)


@dataclass
class CompareConfig:
    """``scripts/compare.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    predictions: dict[str, str] = MISSING
    """Label of a model -> folder of its predictions; the first is the one the summary is about."""
    output: str = MISSING
    """Summary JSON in percent; the scores of every expression go beside it, with the suffix ``.csv``."""
    num_workers: int = 2
    """Processes; results do not depend on it."""
    max_videos: int | None = None
    """Only the first so many videos, as ``predict.py max_videos``; null: all."""

    def __post_init__(self) -> None:
        _check_scoring(self.num_workers, self.max_videos)


@dataclass
class CheckConfig:
    """``tools/check_data.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    against: list[str] = field(default_factory=list)
    """Files of ``configs/dataset`` whose splits must not share a video with this one: those that a model is trained on
    for a test split, and the other way round."""
    alignment: bool = False
    """Also test whether masks lie on the objects of their own frames, or fit other frames better (ReVOS)."""
    num_workers: int = 2
    """Processes; what is found does not depend on it."""
    output: str = MISSING
    """JSON file for everything that was found."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "num_workers", "at least 1", self.num_workers)


@dataclass
class SubmitConfig:
    """``scripts/submit.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    predictions: str = MISSING
    """Folder of ``<video>/<exp_id>/<frame>.png`` or of ``<video>.jsonl``."""
    output: str = MISSING
    """The zip file."""
    num_workers: int = 2
    """Processes; the zip does not depend on it."""

    def __post_init__(self) -> None:
        _check_scoring(self.num_workers, None)


def _check_scoring(num_workers: int, max_videos: int | None) -> None:
    require(num_workers >= 1, "num_workers", "at least 1", num_workers)
    check_max_videos(max_videos)
