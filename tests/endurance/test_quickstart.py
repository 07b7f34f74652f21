"""The quickstart script as the README gives it, at its own sizes: about a quarter of an hour on two cores."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {"appearance", "motion", "global", "local", "multi", "absent", "overall", "overall_present"}
BLIND = ("all_objects", "random_object", "other_sentence")
MARGIN = 10
"""Points of J&F, on appearance and overall, by which each model beats answers that ignore the sentence. (Measured on
two cores: the quickstart's own model 33 and 12, the shipped one 50 and 36.)"""


def margins(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """Kind -> points above the best of the rows that ignore the sentence or answer another one."""
    return {kind: table[kind]["model"] - max(table[kind][row] for row in BLIND) for kind in ("appearance", "overall")}


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = {"QUICKSTART_DATA": str(tmp_path / "data"), "QUICKSTART_OUT": str(out)}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=ROOT, env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    shipped = summary.pop("other_models")["shipped"]
    for name, table in {"quickstart": summary, "shipped": shipped}.items():
        assert set(table) == KINDS
        assert all(set(rows) == {"model", *BLIND, "empty"} for rows in table.values())
        for kind, margin in margins(table).items():
            assert margin >= MARGIN, (name, kind, margin)
    for folder in ("pictures", "shipped_pictures"):
        assert list((out / folder).rglob("*.png"))
        assert list((out / folder).rglob("*.mp4"))
