"""What a stage is asked for and what it gives."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def code_digest() -> str:
    """SHA-256 of the sources and settings that decide what is measured."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(
        path
        for folder, ending in (("glus", "py"), ("tools", "py"), ("configs", "yaml"))
        for path in (root / folder).rglob(f"*.{ending}")
    )
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


class Absent(Exception):
    """The machine lacks what a stage needs; nothing is wrong."""


@dataclass(frozen=True)
class Goal:
    """One thing that must hold."""

    name: str
    found: str
    expected: str
    is_met: bool


@dataclass(frozen=True)
class Table:
    """For the page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Outcome:
    """What a stage found."""

    goals: list[Goal]
    tables: list[Table]
    values: dict[str, Any] = field(default_factory=dict)
    """Everything that was measured, as data."""


@dataclass(frozen=True)
class Sizes:
    """How much a machine is asked to do."""

    model: str = "tiny"
    """Of ``benchmark_inference``: ``tiny`` is the shipped model, ``glus_7b`` has random weights."""
    training_model: str = "glus_tiny"
    videos: int = 1
    """Of a training micro-batch."""
    procedures: tuple[str, ...] = ("ours", "ours, checkpointing", "plain")
    """Of ``benchmark_training``."""
    is_compiled: bool = False
    steps: int = 1
    """Timed training steps of each procedure."""
    predictions: tuple[tuple[int, int], ...] = ((8, 16), (20, 4))
    """Sentences and frames."""
    frame_size: tuple[int, int] = (128, 128)
    plain_frames: int = 4
    """Frames that the plain procedure is timed on, for one sentence."""
    mask_videos: int = 1
    """Generated videos on which bfloat16 is compared with float32."""


def choose_sizes(device: torch.device) -> Sizes:
    """What fits: the full size from 22 GiB on, more videos and less recomputing where there is more."""
    if device.type == "cpu":
        return Sizes()
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    if memory < 22:
        return Sizes(predictions=((16, 75), (60, 16)), mask_videos=20)
    roomy, huge = memory > 70, memory > 100
    procedures = ("ours",) * roomy + ("ours, checkpointing",) + ("plain",) * huge
    return Sizes(
        model="glus_7b",
        training_model="glus_7b",
        videos=2 if roomy else 1,
        procedures=procedures,
        is_compiled=roomy,
        steps=5,
        predictions=((16, 75), (60, 16)),
        frame_size=(720, 1280),
        plain_frames=16,
        mask_videos=20,
    )


def key_table(title: str, rows: Mapping[str, object]) -> Table:
    """Names and values."""
    return Table(title, ("", ""), [(name, str(value)) for name, value in rows.items()])


def describe(device: torch.device) -> str:
    """The name by which a machine is known again."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def yes_or_no(name: str, is_met: bool) -> Goal:
    """A goal that is met or not, without a number."""
    return Goal(name, "yes" if is_met else "no", "yes", bool(is_met))


def need_gpu() -> None:
    """Raise ``Absent`` unless there is a GPU."""
    if not torch.cuda.is_available():
        raise Absent("there is no GPU")
