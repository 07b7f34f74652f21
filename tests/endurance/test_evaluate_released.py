"""The command that evaluates a published checkpoint both ways, on a toy checkpoint in the published layout."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest

from glus.data.shapes_writer import write_shapes
from glus.models.build import LoadedModel
from glus.models.language import merge_lora
from tests.conftest import SAM2_OVERRIDES
from tests.released_layout import glus_tensors, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_published_checkpoint_is_evaluated_both_ways(tiny_model: LoadedModel, tmp_path: Path) -> None:
    glus = copy.deepcopy(tiny_model.glus)
    merge_lora(glus.language.llama)
    released = write_checkpoint(tmp_path / "GLUS-toy", glus_tensors(glus), glus, tiny_model.vocabulary)
    write_shapes(tmp_path / "shapes", "valid", num_videos=2, seed=0, num_frames=8, size=64)
    sam2 = tmp_path / "sam2.json"
    sam2.write_text(json.dumps({"variant": "sam2_hiera_t", "overrides": SAM2_OVERRIDES, "multimask_fallback": False}))
    out = tmp_path / "out"
    done = subprocess.run(
        [
            "bash",
            ROOT / "scripts/evaluate_released.sh",
            released,
            "shapes_valid",
            f"dataset.root={tmp_path / 'shapes'}",
        ],
        cwd=tmp_path,
        env={**os.environ, "RELEASED_OUT": str(out), "RELEASED_CONVERT": f"--segmenter {sam2}"},
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
