"""How many files one must read to follow a training step, a predicted video or a score: those whose functions run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, run, run_program

MODEL = ROOT / "assets" / "glus_shapes"
MOST_FILES = {"train": 18, "predict": 12, "score": 12}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flows") / "shapes"
    made = run_program("tools/make_shapes.py", folder, "--train-videos", 2, "--valid-videos", 1)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def predicted(shapes: Path) -> tuple[Path, dict[str, list[str]]]:
    """A predicted video, and what ran for it."""
    output = shapes.parent / "predicted"
    settings = {"dataset": "shapes_valid", "dataset.root": shapes, "weights": MODEL, "output": output}
    heart = ("glus.inference.predictor", "VideoPredictor.segment", 1)
    return output, follow(heart, "scripts/predict.py", {**settings, "max_videos": 1})


def follow(heart: tuple[str, str, int], program: str, settings: dict[str, object]) -> dict[str, list[str]]:
    """File -> functions that run in one call.

    Args:
        heart: module, function, and which call of it.
        program: that calls it.
        settings: of the program.
    """
    overrides = [f"{key}={value}" for key, value in settings.items()]
    done = run(sys.executable, ROOT / "tests" / "flow_worker.py", *heart, ROOT / program, *overrides)
    assert done.returncode == 0, done.stderr
    functions: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return functions


def check(flow: str, functions: dict[str, list[str]]) -> None:
    assert len(functions) <= MOST_FILES[flow], "\n".join(f"{file}: {', '.join(f)}" for file, f in functions.items())


def test_a_training_step_is_a_walk_through_few_files(shapes: Path, tmp_path: Path) -> None:
    numbers = {"trainer.steps": 2, "trainer.global_batch_size": 1, "trainer.micro_batch_size": 1, "data.num_workers": 0}
    settings = {
        "experiment": "shapes",
        "model.weights": MODEL,
        "model.llm.tokenizer": MODEL,
        "valid": "null",
        "data.mixture.shapes.dataset.root": shapes,
        "output": tmp_path / "run",
    }
    functions = follow(("glus.train.trainer", "Trainer.train_step", 2), "scripts/train.py", {**settings, **numbers})
    assert {"glus/models/glus.py", "glus/losses/objective.py", "glus/train/engine.py"} <= functions.keys()
    check("train", functions)


def test_a_predicted_video_is_a_walk_through_few_files(predicted: tuple[Path, dict[str, list[str]]]) -> None:
    _, functions = predicted
    assert {"glus/inference/video_run.py", "glus/models/segmenter/sam2.py"} <= functions.keys()
    check("predict", functions)


def test_a_score_is_a_walk_through_few_files(shapes: Path, predicted: tuple[Path, dict[str, list[str]]]) -> None:
    folder, _ = predicted
    settings = {"dataset": "shapes_valid", "dataset.root": shapes, "predictions": folder}
    heart = ("glus.evaluation.score", "score_predictions", 1)
    functions = follow(heart, "scripts/score.py", {**settings, "max_videos": 1, "num_workers": 1})
    assert {"glus/evaluation/packed.py", "glus/data/predictions.py"} <= functions.keys()
    check("score", functions)
