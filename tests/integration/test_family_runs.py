"""The other families on Shapes, as a user runs them: pre-training, training, prediction, scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.programs import run_program

SMALL = ["num_scenes=8", "num_frames=8", "clip_steps=50", "llm_steps=50", "clip_batch_size=8", "llm_batch_size=3"]
TRAINING = ["data.num_workers=0", "trainer.steps=24", "trainer.warmup_steps=4", "trainer.global_batch_size=2",
            "trainer.micro_batch_size=2", "trainer.log_every=1", "paths.weights=weights"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model", "parts"), [("qwen3_vl", "qwen3_vl"), ("internvl3", "internvl")])
def test_a_run_of_a_family(model: str, parts: str, tmp_path: Path) -> None:
    def program(name: str, *arguments: str) -> str:
        done = run_program(name, *arguments, folder=tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    chosen = f"model=glus_{model}_tiny"
    sizes = ("--train-videos", "3", "--valid-videos", "2", "--num-frames", "8")
    program("tools/make_shapes.py", "data/shapes", *sizes)
    towers = ("parts=[tokenizer,mllm]", f"output=weights/shapes_{parts}")
    program("tools/pretrain_towers.py", chosen, *towers, *SMALL)
    program("scripts/train.py", "experiment=shapes", chosen, "valid=null", "output=outputs/run", *TRAINING)
    lines = map(json.loads, (tmp_path / "outputs/run/metrics.jsonl").read_text().splitlines())
    losses = [line["bce"] + line["dice"] + line["seg"] for line in lines]
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    places = ("dataset=shapes_valid", "weights=outputs/run", "output=outputs/masks", "format=rle")
    assert "2 of 2 videos, 16 frames" in program("scripts/predict.py", *places)
    report = program("scripts/score.py", "dataset=shapes_valid", "predictions=outputs/masks", "existence_threshold=0.3")
    assert "as predicted" in report
    assert "existence_threshold=0.3" in report
