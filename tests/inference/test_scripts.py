"""predict.py, show.py and segment_video.py as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, PredictConfig, ShowConfig
from glus.data.index import read_expressions
from glus.evaluation.score import score_predictions

ROOT = Path(__file__).parents[2]


def load_script(name: str) -> ModuleType:
    """A program of ``scripts/`` as a module, to run it without the seconds that a new process takes to import."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", **variables}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *arguments), env=environment(), capture_output=True, text=True, timeout=120)


def masks_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def predictions(dataset: DatasetConfig, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "predictions"
    result = run("predict.py", *overrides(dataset, model_folder, folder))
    assert result.returncode == 0, result.stderr
    assert f"{num_masks(dataset)} masks of {len(read_expressions(dataset))} expressions in 3 videos" in result.stdout
    return folder


def overrides(dataset: DatasetConfig, weights: Path, output: Path) -> list[str]:
    return [f"dataset.root={dataset.root}", f"weights={weights}", f"output_dir={output}"]


def num_masks(dataset: DatasetConfig) -> int:
    return sum(len(expression.frames) for expression in read_expressions(dataset))


def test_predictions_are_complete_and_counted(predictions: Path, dataset: DatasetConfig):
    report = score_predictions(dataset, predictions)
    assert not report.problems
    assert not report.warnings
    summary = json.loads((predictions / "summary_rank0.json").read_text())
    assert summary["masks"] == num_masks(dataset) == len(masks_below(predictions))
    assert 0 < summary["without_seg"] <= summary["masks"], "a random model rarely says [SEG]"
    empty = sum(not np.array(Image.open(predictions / name)).any() for name in masks_below(predictions))
    assert summary["empty_masks"] == empty
    assert summary["predicted_frames"] == 18


def test_a_finished_folder_is_left_as_it_is(predictions: Path, dataset: DatasetConfig, model_folder: Path):
    before = {path: path.stat().st_mtime_ns for path in predictions.rglob("*.png")}
    config = PredictConfig(dataset=dataset, weights=str(model_folder), output_dir=str(predictions))
    summary = load_script("predict").predict(config)
    assert summary.predicted_videos == 0
    assert summary.masks == num_masks(dataset)
    assert {path: path.stat().st_mtime_ns for path in predictions.rglob("*.png")} == before


def test_another_setting_is_one_clear_message(predictions: Path, dataset: DatasetConfig, model_folder: Path):
    other = run("predict.py", *overrides(dataset, model_folder, predictions), "inference.memory_stride=1")
    assert other.returncode == 1
    message = other.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "inference.memory_stride: 3 there, 1 now" in message
    assert "inference.memory_stride: 1 instead of the model folder's 3" in other.stdout + other.stderr


def test_processes_share_the_videos(
    predictions: Path, dataset: DatasetConfig, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SLURM tasks that never meet write what one process writes."""
    config = PredictConfig(dataset=dataset, weights=str(model_folder), output_dir=str(tmp_path / "out"))
    predict = load_script("predict").predict
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    videos = []
    for rank in "10":
        monkeypatch.setenv("SLURM_PROCID", rank)
        videos.append(predict(config).predicted_videos)
    assert videos == [1, 2]
    assert masks_below(tmp_path / "out") == masks_below(predictions)
    written = [json.loads((tmp_path / f"out/summary_rank{rank}.json").read_text()) for rank in "01"]
    assert sum(summary["masks"] for summary in written) == num_masks(dataset)


@pytest.mark.slow
def test_a_killed_run_is_continued(predictions: Path, dataset: DatasetConfig, model_folder: Path, tmp_path: Path):
    folder = tmp_path / "out"
    for _ in range(2):  # once before and once after something is finished
        task = subprocess.Popen(
            command("predict.py", *overrides(dataset, model_folder, folder)), env=environment(), stderr=subprocess.PIPE
        )
        finished = len(list(folder.glob("valid*/[0-9]*")))
        while task.poll() is None and not (
            list(folder.glob("valid*/.*.tmp/*.png")) and len(list(folder.glob("valid*/[0-9]*"))) >= finished
        ):
            time.sleep(0.01)
        task.send_signal(signal.SIGKILL)
        assert task.wait() == -signal.SIGKILL
        for expression in read_expressions(dataset):
            path = folder / expression.video / expression.exp_id
            assert not path.exists() or len(list(path.glob("*.png"))) == len(expression.frames)
    result = run("predict.py", *overrides(dataset, model_folder, folder))
    assert result.returncode == 0, result.stderr
    assert masks_below(folder) == masks_below(predictions)


def test_show(predictions: Path, dataset: DatasetConfig, tmp_path: Path):
    config = ShowConfig(
        dataset=dataset, predictions=str(predictions), output_dir=str(tmp_path),
        num_videos=1, num_expressions=2, num_frames=3,
    )  # fmt: skip
    show = load_script("show").show
    written = show(config)
    assert [path.suffix for path in written] == [".png", ".png", ".mp4", ".gif"]
    assert all(path.stat().st_size > 1000 for path in written)
    with Image.open(written[0]) as image:
        assert image.width == 3 * 256 + 2 * 6
    with pytest.raises(ValueError, match="the split has no 'nobody'"):
        show(replace(config, videos=["nobody"]))
    with pytest.raises(ValueError, match="is missing"):
        show(replace(config, predictions=str(tmp_path)))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in (1, 2, 10):
        Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(folder / f"img{number}.png")
    return folder


def test_segment_video(frames: Path, model_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = ("--video", frames, "--weights", model_folder, "--output", out, "--text", "The cat.", "--text", "a dog")
    result = run("segment_video.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a-dog", "overlay.mp4", "summary.json", "the-cat"]
    summary = json.loads((out / "summary.json").read_text())
    assert [sentence["text"] for sentence in summary["sentences"]] == ["The cat.", "a dog"]
    for sentence in summary["sentences"]:
        assert [answer["frame"] for answer in sentence["frames"]] == ["img1", "img2", "img10"]
        for answer in sentence["frames"]:
            with Image.open(out / sentence["folder"] / f"{answer['frame']}.png") as image:
                assert image.size == (50, 30)
                assert np.mean(np.array(image) == 255) == pytest.approx(answer["area"], abs=1e-6)
            assert 0 <= answer["score"] <= 1
    assert not list(tmp_path.glob(".*"))

    main = load_script("segment_video").main
    with pytest.raises(SystemExit, match="add --overwrite"):
        main([*map(str, arguments)])

    # A movie is a video file like any other.
    movie = (
        "--video",
        out / "overlay.mp4",
        "--weights",
        model_folder,
        "--text",
        "x",
        "--output",
        tmp_path / "of_movie",
    )
    main([*map(str, movie)])
    assert sorted(path.name for path in (tmp_path / "of_movie/x").glob("*.png")) == [f"0000{i}.png" for i in range(3)]


def test_segment_video_says_what_is_wrong(frames: Path, model_folder: Path, tmp_path: Path):
    (frames / "img2.png").write_bytes(b"not a picture")
    arguments = ("--video", frames, "--weights", model_folder, "--text", "x", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^error: .*img2"):
        load_script("segment_video").main([*map(str, arguments)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames"], "nothing is left of it"


def test_sentences_become_folder_names():
    names = load_script("segment_video").sentence_folders
    assert names(["The red car!", "the red car", "猫", "?", "!"]) == [
        "the-red-car", "the-red-car-2", "猫", "sentence-4", "sentence-5",
    ]  # fmt: skip
