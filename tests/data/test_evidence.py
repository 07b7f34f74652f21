"""The frames that a variant can decide, held against the table of the benchmark's design, and against files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glus.config import DatasetConfig, FramesConfig, Layout, QuerySampling
from glus.data.evidence import Variant, decided_frames, read_evidence, variant_of
from glus.shapes.scene import STRUCTURES, marked_frames, scene_of
from glus.shapes.write import write_shapes

BOTH = FramesConfig(4, 4)
VARIANTS = {
    "one query frame": Variant(FramesConfig(4, 1), has_memory=False),
    "global only": Variant(FramesConfig(4, 4, QuerySampling.uniform), has_memory=False),
    "local only": Variant(FramesConfig(0, 4), has_memory=False),
    "both": Variant(BOTH, has_memory=False),
    "+ memory": Variant(BOTH, has_memory=True),
    "+ key frames": Variant(BOTH, has_memory=True, has_key_frames=True),
}
TABLE = {
    "seen": (16, 16, 16, 16, 16, 16),
    "context": (16, 16, 4, 16, 16, 16),
    "blink": (4, 4, 44 / 3, 44 / 3, 44 / 3, 16),
    "memory": (2, 8, 5, 5, 16, 16),
    "crossing": (2, 8, 5, 5, 16, 16),
    "late": (3, 4, 5, 5, 5, 16),
}
"""Frames of 16, each phase of ``blink`` being as likely."""


@pytest.mark.parametrize(("structure", "expected"), TABLE.items())
def test_the_table(structure: str, expected: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    evidence = {marked_frames(structure, 16, rng) for _ in range(50)}
    assert len(evidence) == (3 if structure == "blink" else 1)
    for variant, frames in zip(VARIANTS.values(), expected, strict=True):
        counts = [int(decided_frames(marked, 16, variant).sum()) for marked in evidence]
        assert np.mean(counts) == pytest.approx(frames), (structure, variant)


def test_undecided_frames_lie_where_they_must() -> None:
    def frames(structure: str, variant: str, start: int | None = None) -> list[int]:
        marked = marked_frames(structure, 16, np.random.default_rng(0))
        return np.flatnonzero(decided_frames(marked, 16, VARIANTS[variant], start)).tolist()

    assert frames("context", "local only") == [12, 13, 14, 15]
    assert frames("memory", "global only") == [0, 1, 4, 5, 8, 9, 12, 13]
    assert frames("memory", "both") == [0, 1, 2, 3, 4]
    assert frames("late", "+ memory") == [11, 12, 13, 14, 15]
    assert frames("late", "+ key frames", 8) == [11, 12, 13, 14, 15]
    assert frames("memory", "+ key frames", 8) == [0, 1]
    assert frames("late", "+ key frames", 12) == [*range(16)]


def test_a_record_of_predictions_that_is_not_whole_is_named(tmp_path: Path) -> None:
    assert variant_of(tmp_path) is None
    (tmp_path / "predict.json").write_text('{"identity": {"inference": {"window": "sliding"}}}')
    with pytest.raises(ValueError, match=r"predict\.json is damaged: it does not say what predicted .*'frames'"):
        variant_of(tmp_path)


def test_a_written_split_says_what_the_plan_says(tmp_path: Path) -> None:
    write_shapes(tmp_path, "valid", len(STRUCTURES), num_frames=8, size=48)
    dataset = DatasetConfig("shapes", Layout.mevis, str(tmp_path), "valid", evidence="evidence.json")
    found = read_evidence(dataset)
    for index in range(len(STRUCTURES)):
        plan = scene_of(0, "valid", index, 8, 48)
        named = [number for number, s in enumerate(plan.sentences) if s.kind in STRUCTURES]
        assert len(named) == 4
        for number in named:
            assert found[f"valid{index:05d}", str(number)] == plan.evidence(plan.sentences[number])
    dataset.evidence = None
    assert read_evidence(dataset) == {}
