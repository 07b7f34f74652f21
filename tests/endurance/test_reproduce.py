"""The chain of the reproduction scripts on tiny data, stopped in the middle and continued."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from glus.data.shapes_writer import write_shapes
from glus.tokens import Vocabulary

ROOT = Path(__file__).parents[2]
STAGES = {"check_shapes_valid", "train", "export", "predict_shapes_valid", "score_shapes_valid", "submit_shapes_valid"}


def test_both_scripts_run_the_shared_one_for_their_experiment() -> None:
    for name in ("glus_s", "glus_a"):
        script = (ROOT / "scripts" / f"reproduce_{name}.sh").read_text()
        assert f'exec bash "$(dirname "$0")/reproduce.sh" {name}\n' in script


@pytest.mark.slow
def test_the_chain_runs_stops_and_continues(tiny_vocabulary: Vocabulary, tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", "train", num_videos=2, seed=0, num_frames=8, size=64)
    write_shapes(tmp_path / "shapes", "valid", num_videos=2, seed=0, num_frames=8, size=64)
    out = tmp_path / "out"
    random = [f"model.{part}.weights=null" for part in ("clip", "llm", "segmenter")]
    sizes = ["trainer.steps=1", "trainer.global_batch_size=1", "trainer.micro_batch_size=1", "data.num_workers=0"]
    env = {
        **os.environ,
        "REPRODUCE_OUT": str(out),
        "REPRODUCE_CHECK": "shapes_valid",
        "REPRODUCE_SCORE": "shapes_valid",
        "REPRODUCE_SUBMIT": "shapes_valid",
        "REPRODUCE_PATHS": f"paths.data={tmp_path}",
        "REPRODUCE_TRAIN": " ".join([*random, *sizes, "valid=null", f"model.llm.tokenizer={tiny_vocabulary.folder}"]),
    }

    def run() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / "reproduce.sh"), "shapes"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    (out / "predictions").mkdir(parents=True)
    (out / "predictions" / "shapes_valid").write_text("in the way")
    broken = run()
    assert broken.returncode != 0
    assert {path.name for path in (out / "stages").iterdir()} == {"check_shapes_valid", "train", "export"}
    (out / "predictions" / "shapes_valid").unlink()
    done = run()
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert "== train: done before" in done.stdout
    assert "J&F" in done.stdout
    assert {path.name for path in (out / "stages").iterdir()} == STAGES
    with zipfile.ZipFile(out / "shapes_valid.zip") as archive:
        assert any(name.endswith(".png") for name in archive.namelist())
