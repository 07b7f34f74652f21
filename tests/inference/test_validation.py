"""Validation during training: the scores of whole videos, folded frame by frame."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.index import by_video, open_masks, read_expressions
from glus.data.frames import DatasetVideo, FrameStore, VideoSource
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.inference.validation import Validation
from glus.types import Expression, FrameResult
from tests.layouts import SIZE, WRITERS

METRICS = {"J": region_similarity, "F": boundary_accuracy}


class Guessing:
    """Answers with random boxes, first one half of the sentences in every frame, then the other."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.glus = torch.nn.Linear(1, 1)
        self.alive: list[weakref.ref] = []
        self.most_alive = 0

    def segment(self, video: VideoSource, texts: Sequence[str]) -> Iterator[FrameResult]:
        """Results as key frames give them: not all sentences at once."""
        assert not self.glus.training
        height, width = video.read(0).shape[:2]
        for rows in (range(0, len(texts), 2), range(1, len(texts), 2)):
            for frame in range(len(video)):
                masks = np.stack([box(row, frame, height, width) for row in rows])
                self.alive.append(weakref.ref(masks))
                scores = np.ones(len(rows), np.float32)
                yield FrameResult(frame, tuple(rows), masks, scores, scores > 0, scores)
                del masks
                gc.collect()
                self.most_alive = max(self.most_alive, sum(one() is not None for one in self.alive))


def box(row: int, frame: int, height: int, width: int) -> np.ndarray:
    """(H, W) bool."""
    rng = np.random.default_rng((row, frame))
    (top, bottom), (left, right) = (np.sort(rng.integers(0, side, 2)) for side in (height, width))
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_the_mean_over_expressions_of_the_mean_over_frames(dataset: DatasetConfig) -> None:
    predictor = Guessing()
    shown: list[Any] = []
    show = lambda *parts: shown.extend(parts)  # noqa: E731
    scores = Validation(predictor, dataset, METRICS, 2, show)()  # type: ignore[arg-type]
    masks, expected = open_masks(dataset), {name: [] for name in METRICS}
    for video in by_video(read_expressions(dataset))[:2]:
        frames = range(len(video[0].frames))
        for row, expression in enumerate(video):
            size = masks_size(dataset, expression)
            predicted = np.stack([box(row, frame, *size) for frame in frames])
            target = masks.read(expression, frames, size)
            for name, metric in METRICS.items():
                expected[name].append(metric(predicted, target).mean())
    for name, values in expected.items():
        assert scores[name] == pytest.approx(100 * np.mean(values), rel=1e-9)
    assert scores["J&F"] == pytest.approx((scores["J"] + scores["F"]) / 2)
    examples, movie = shown
    assert [example.text for example in examples] == [
        e.text for v in by_video(read_expressions(dataset))[:2] for e in v
    ]
    for name, values in expected.items():
        assert [example.scores[name] for example in examples] == pytest.approx([100 * value for value in values])
    assert len(movie) == len(read_expressions(dataset)[0].frames)
    assert predictor.glus.training, "the model returns to training"
    assert predictor.most_alive <= 1, "masks of a whole video may fill gigabytes"


def test_a_split_without_masks_stops_the_run_before_training(tmp_path: Path) -> None:
    names_none = WRITERS[Layout.mevis](tmp_path, "valid").dataset
    with pytest.raises(ValueError, match=r"none of its 4 expressions has objects .* cannot be trained on or scored"):
        Validation(Guessing(), names_none, METRICS, 2)  # type: ignore[arg-type]
    named = WRITERS[Layout.mevis](tmp_path, "valid_u").dataset
    (tmp_path / "valid_u/mask_dict.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no masks at .*mask_dict.json"):
        Validation(Guessing(), named, METRICS, 2)  # type: ignore[arg-type]


def test_what_has_no_truth_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the first video one frame of the sentences about an object, and all of those about the other."""
    dataset = WRITERS[Layout.reason_vos](tmp_path, "valid").dataset
    first, second = (tmp_path / f"Annotations/MOSE_reason0_{number}" for number in (1, 2))
    (first / "00002.png").unlink()
    shutil.rmtree(second)
    second.mkdir()
    shown: list[Any] = []
    with caplog.at_level(logging.WARNING):
        validation = Validation(Guessing(), dataset, METRICS, 1, lambda *parts: shown.extend(parts))  # type: ignore[arg-type]
    assert "no ground truth: 12 frames, among them all of 2 of 4 sentences" in caplog.text
    scores = validation()
    known, expressions = [0, 1, 3, 4], read_expressions(dataset)[:2]
    values = []
    for row, expression in enumerate(expressions):
        predicted = np.stack([box(row, frame, *SIZE) for frame in known])
        values.append(region_similarity(predicted, open_masks(dataset).read(expression, known, SIZE)).mean())
    assert scores["J"] == pytest.approx(100 * np.mean(values), rel=1e-9)
    examples, movie = shown
    assert [example.text for example in examples] == [expression.text for expression in expressions]
    assert len(movie) == 5
    shutil.rmtree(first)
    first.mkdir()
    with pytest.raises(ValueError, match=r"no frame of its first 1 videos has a ground truth"):
        Validation(Guessing(), dataset, METRICS, 1)  # type: ignore[arg-type]


def masks_size(dataset: DatasetConfig, expression: Expression) -> tuple[int, int]:
    """Of the frames of an expression's video."""
    pixels = DatasetVideo(FrameStore(dataset), expression.video, expression.frames).read(0)
    return pixels.shape[0], pixels.shape[1]
