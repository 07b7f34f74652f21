"""Frames are scored, and predictions start from the best: score_frames.py, predict.py, score.py in a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, PredictConfig, PredictionConfig, PredictionForm
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.index import read_expressions
from glus.evaluation.score import by_video, score_predictions
from glus.inference.keyframes import read_key_frames, write_key_frames
from glus.inference.predictor import load_predictor
from tests.inference.test_scripts import load_script


@pytest.fixture
def predict_from(dataset: DatasetConfig, model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs predict.py with a file of key frames (None: without) and gives the folder of its predictions."""
    predict = load_script("predict").predict

    def run(key_frames: Path | None, form: PredictionForm = PredictionForm.png) -> Path:
        folder = tmp_path / f"{key_frames.stem if key_frames else 'plain'}_{form.value}"
        settings = PredictionConfig(key_frames=str(key_frames) if key_frames else None)
        config = PredictConfig(dataset=dataset, weights=str(model_folder), output_dir=str(folder), inference=settings)
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


def test_predictions_from_other_key_frames_are_not_mixed(predict_from, dataset, tmp_path):
    expressions, file = read_expressions(dataset), tmp_path / "key_frames.json"
    write_key_frames(file, [(expression, 1) for expression in expressions])
    folder = predict_from(file)
    assert json.loads((folder / "predict.json").read_text())["identity"]["key_frames"]
    write_key_frames(file, [(expression, 2) for expression in expressions])
    with pytest.raises(ValueError, match=r"predictions made otherwise \(key_frames: \w+ there, \w+ now\)"):
        predict_from(file)
