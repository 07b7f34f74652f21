"""The command that evaluates a published checkpoint both ways, on a toy checkpoint in the published layout."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from glus.shapes.write import write_shapes

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_released.sh"


@pytest.mark.slow
def test_a_published_checkpoint_is_evaluated_both_ways(released: Path, segmenter_file: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", "valid", num_videos=2, seed=0, num_frames=8, size=64)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", SCRIPT, released, "shapes_valid", f"dataset.root={tmp_path / 'shapes'}"],
        cwd=tmp_path,
        env={**os.environ, "RELEASED_OUT": str(out), "RELEASED_CONVERT": f"--segmenter {segmenter_file}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "fuser_gamma=identity (as released)" in done.stdout
    assert "fuser_gamma=checkpoint (as trained)" in done.stdout
    masks = {gamma: list((out / "shapes_valid" / gamma).rglob("*.png")) for gamma in ("identity", "checkpoint")}
    assert len(masks["identity"]) == len(masks["checkpoint"]) > 0
    settings = [json.loads(file.read_text()) for file in sorted((out / "shapes_valid").glob("*/predict.json"))]
    assert {value["identity"]["model"]["segmenter"]["fuser_gamma"] for value in settings} == {"identity", "checkpoint"}
