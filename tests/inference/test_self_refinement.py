"""Frames are scored, and predictions start from the best: score_frames.py, predict.py, score.py in a row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import (
    DatasetConfig,
    PredictConfig,
    PredictionConfig,
    PredictionForm,
    ScoreFramesConfig,
    SettingsConfig,
)
from glus.data.benchmarks.index import by_video, read_expressions
from glus.data.frames import DatasetVideo, FrameStore
from glus.evaluation.score import score_predictions
from glus.inference.key_frames import read_key_frames, write_key_frames
from glus.inference.predictor import load_predictor
from glus.models.glus import IouHead
from tests.programs import load_script
from tools.benchmarks.plain import counted


@pytest.fixture
def predict_from(dataset: DatasetConfig, model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs predict.py with a file of key frames (None: without) and gives the folder of its predictions."""
    predict = load_script("predict").predict

    def run(key_frames: Path | None, form: PredictionForm = PredictionForm.png) -> Path:
        folder = tmp_path / f"{key_frames.stem if key_frames else 'plain'}_{form.value}"
        settings = PredictionConfig(key_frames=str(key_frames) if key_frames else None)
        config = PredictConfig(dataset=dataset, weights=str(model_folder), output=str(folder), inference=settings)
        predict(replace(config, format=form))
        return folder

    return run


def test_predictions_start_from_published_key_frames(predict_from, dataset, model_folder, tmp_path):
    expressions = read_expressions(dataset)
    starts = [number % len(expression.frames) for number, expression in enumerate(expressions)]
    file = tmp_path / "published.json"
    write_key_frames(file, zip(expressions, starts, strict=True))
    assert list(read_key_frames(file, expressions).values()) == starts

    folder = predict_from(file)
    video = by_video(expressions)[1]
    key_frames = [starts[expressions.index(expression)] for expression in video]
    source = DatasetVideo(FrameStore(dataset), video[0].video, video[0].frames)
    predictor, _ = load_predictor(model_folder)
    for result in predictor.segment(source, [expression.text for expression in video], key_frames):
        for row, mask in zip(result.rows, result.masks_RHW, strict=True):
            png = folder / video[row].prediction_dir / f"{video[row].frames[result.frame]}.png"
            np.testing.assert_array_equal(np.array(Image.open(png)) > 0, mask)

    in_pngs, in_codes = (score_predictions(dataset, f) for f in (folder, predict_from(file, PredictionForm.rle)))
    assert not in_pngs.problems
    assert in_pngs.expressions == in_codes.expressions
    assert in_pngs.expressions != score_predictions(dataset, predict_from(None)).expressions


@pytest.fixture
def scoring(dataset: DatasetConfig, model_folder: Path, tmp_path: Path) -> ScoreFramesConfig:
    return ScoreFramesConfig(dataset=dataset, weights=str(model_folder), output=str(tmp_path / "frames"))


@pytest.mark.parametrize("has_head", [False, True])
def test_frames_are_scored_and_predictions_start_from_the_best(
    dataset, model_folder, scoring, tmp_path, monkeypatch, has_head
):
    """At most three passes of SAM2 over a frame (two with a head), two of CLIP, in the two programs together."""
    predictor, model = load_predictor(model_folder)
    if has_head:
        model.glus.iou_head = IouHead(model.glus.mllm.width, model.glus.segmenter.width)
    monkeypatch.setattr("glus.inference.job.load_predictor", lambda *_: (predictor, model))
    score = predictor.score_frames  # later frames shall be better, whatever a random model makes of them
    monkeypatch.setattr(predictor, "score_frames", lambda *a: (s := score(*a)) * np.linspace(0.1, 1, s.shape[1]))
    expressions = read_expressions(dataset)
    num_frames = sum(len(video[0].frames) for video in by_video(expressions))

    with counted(model.glus) as counts:
        chosen = load_script("score_frames").choose_key_frames(scoring)
    assert (counts["CLIP images"], counts["SAM2 images"]) == (num_frames, 0 if has_head else num_frames)
    assert (chosen.videos, chosen.done, len(chosen.scores)) == (3, 3, len(expressions))
    key_frames = read_key_frames(chosen.file, expressions)
    for expression in expressions:
        scores = json.loads((tmp_path / f"frames/scores/{expression.video}.json").read_text())
        assert scores["frames"] == list(expression.frames)
        row = scores["scores"][expression.exp_id]
        assert key_frames[expression.name] == row.index(max(row))
    mean, best = (np.mean([f(row) for row in chosen.scores]) for f in (np.mean, np.max))
    assert 0 < mean < best <= 1
    num_first = list(key_frames.values()).count(0)
    assert num_first < len(expressions)
    assert chosen.table().splitlines() == [
        f"3 of 3 videos, {len(expressions)} expressions",
        f"mean score of a frame      {mean:.3f}",
        f"mean score of a key frame  {best:.3f}",
        f"key frame is the first     {num_first} ({num_first / len(expressions):.1%})",
    ]

    settings = PredictionConfig(key_frames=str(chosen.file))
    masks = str(tmp_path / "masks")
    config = PredictConfig(dataset=dataset, weights=str(model_folder), output=masks, inference=settings)
    with counted(model.glus) as counts:
        load_script("predict").predict(config)
    assert counts["CLIP images"] == num_frames
    assert num_frames < counts["SAM2 images"] <= 2 * num_frames
    assert not score_predictions(dataset, tmp_path / "masks").problems


def test_scoring_goes_on_where_it_was_left(scoring, dataset, tmp_path):
    choose = load_script("score_frames").choose_key_frames
    frames, videos = tmp_path / "frames", by_video(read_expressions(dataset))
    choose(scoring)
    whole = {path.name: path.read_bytes() for path in frames.rglob("*.json") if path.name != "score_frames.json"}
    kept, lost = (frames / "scores" / f"{video[0].video}.json" for video in videos[:2])
    for path in (lost, frames / "key_frames.json"):
        path.unlink()
    kept_at = kept.stat().st_mtime_ns
    choose(scoring)
    assert {path.name: path.read_bytes() for path in frames.rglob("*.json") if path.name in whole} == whole
    assert kept.stat().st_mtime_ns == kept_at
    strided = replace(scoring, inference=SettingsConfig(num_query=2))
    with pytest.raises(ValueError, match=r"holds scores made otherwise \(frames.num_query: 1 there, 2 now\)"):
        choose(strided)


def test_there_are_no_key_frames_before_all_videos_are_scored(scoring, dataset, tmp_path):
    choose = load_script("score_frames").choose_key_frames
    broken = Path(shutil.copytree(dataset.root, tmp_path / "broken"))
    first = by_video(read_expressions(dataset))[0][0]
    (frame,) = broken.glob(f"valid/JPEGImages/{first.video}/{first.frames[2]}.*")
    good = frame.read_bytes()
    frame.write_bytes(good[: len(good) // 2])
    scoring = replace(scoring, dataset=replace(dataset, root=str(broken)))
    with pytest.raises(ValueError, match=rf"1 of 3 videos could not be scored \(2 are done\)(?s:.*){first.video}"):
        choose(scoring)
    assert not (tmp_path / "frames" / "key_frames.json").exists()
    frame.write_bytes(good)
    assert choose(scoring).file.is_file()


def test_predictions_from_other_key_frames_are_not_mixed(predict_from, dataset, tmp_path):
    expressions, file = read_expressions(dataset), tmp_path / "key_frames.json"
    write_key_frames(file, [(expression, 1) for expression in expressions])
    folder = predict_from(file)
    assert json.loads((folder / "predict.json").read_text())["identity"]["key_frames"]
    write_key_frames(file, [(expression, 2) for expression in expressions])
    with pytest.raises(ValueError, match=r"predictions made otherwise \(key_frames: \w+ there, \w+ now\)"):
        predict_from(file)
