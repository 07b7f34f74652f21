"""The quickstart script as the README gives it, at its own sizes: minutes on two cores."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARGINS = ("appearance", "context", "blink", "mean_over_kinds")
MARGIN = 10
"""Points of J&F, on each of these, by which each model beats the best answer that ignores the sentence."""


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = {"QUICKSTART_DATA": str(tmp_path / "data"), "QUICKSTART_OUT": str(out)}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=ROOT, env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((out / "comparison.json").read_text())
    shipped = summary.pop("other_models")["shipped"]
    for name, table in {"quickstart": summary, "shipped": shipped}.items():
        for kind in MARGINS:
            assert table[kind]["margin"] >= MARGIN, (name, kind, table[kind])
    assert "not found in 16 of 16 frames" in done.stdout
    assert list((out / "example").rglob("*.mp4"))
    assert (out / "report.html").stat().st_size > 100_000
