"""The quickstart script from beginning to end, with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "TRAIN_VIDEOS": 4,
    "VALID_VIDEOS": 3,
    "SCENES": 20,
    "CLIP_STEPS": 2,
    "LLM_STEPS": 2,
    "SAM2_STEPS": 2,
    "STEPS": 2,
}
ROWS = {"model", "all_objects", "random_object", "other_sentence", "empty"}


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    sizes = {f"QUICKSTART_{name}": str(value) for name, value in TINY.items()}
    places = {"QUICKSTART_DATA": str(tmp_path / "data"), "QUICKSTART_OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=ROOT,
        env={**os.environ, **sizes, **places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"appearance", "multi", "absent", "overall", "overall_present"} <= set(summary)
    assert all(set(rows) == ROWS for kind, rows in summary.items() if kind != "other_models")
    assert list((tmp_path / "out" / "pictures").rglob("*.png"))
    assert list((tmp_path / "out" / "pictures").rglob("*.mp4"))
