"""What a threshold on existence is said to do is what it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glus.config import Layout, Missing, PredictionForm
from glus.data.benchmarks.index import by_video, read_expressions
from glus.data.predictions import write_predictions
from glus.evaluation.report import summarize
from glus.evaluation.score import Thresholds, Undecided, calibrate, score_predictions
from glus.types import FrameResult
from tests.evaluation.predicted import true_masks
from tests.layouts import WRITERS, Written


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """MeViS v2, whose sentences may fit nothing."""
    return WRITERS[Layout.mevis_v2](tmp_path_factory.mktemp("data"), "valid_u")


def predict(folder: Path, written: Written, threshold: float = 0.0, form: PredictionForm = PredictionForm.png) -> Path:
    """The truth shifted by random amounts, something where nothing is, and random existence."""
    rng, masks = np.random.default_rng(0), true_masks(written)
    for video in by_video(read_expressions(written.dataset)):
        truth_ETHW = np.stack([masks[expression.video, expression.exp_id] for expression in video])
        with write_predictions(folder, video, form) as write:
            for frame, name in enumerate(video[0].frames):
                answers = np.roll(truth_ETHW[:, frame], rng.integers(0, 5), axis=2) > 0
                answers[:, 3:9, 3:9] |= rng.random(len(video))[:, None, None] < 0.3
                scores, objects = rng.random((2, len(video))).astype(np.float32).round(3)
                rows, has_seg = tuple(range(len(video))), np.ones(len(video), bool)
                answers[scores.astype(float) * objects < threshold] = False
                write(name, FrameResult(frame, rows, answers, scores, has_seg, objects))
    return folder


@pytest.mark.parametrize("form", PredictionForm)
def test_the_report_says_what_emptied_masks_score(written, tmp_path, form):
    folder = predict(tmp_path / "plain", written, form=form)
    for threshold in (0.1, 0.25, 0.6):
        report = score_predictions(written.dataset, folder, existence_threshold=threshold)
        rows = next(table.rows for table in report.tables if table.name == "existence")
        emptied = score_predictions(written.dataset, predict(tmp_path / f"{threshold}", written, threshold))
        for scored, row in zip((report, emptied), rows.values(), strict=True):
            scores = summarize(scored.expressions)
            expected = {"J&F": scores.jf, "N-acc": scores.no_target_accuracy, "T-acc": scores.target_accuracy}
            assert row == pytest.approx({**expected, "Final": sum(expected.values()) / 3})
        assert list(rows) == ["as predicted", f"existence_threshold={threshold}"]
    assert rows["as predicted"] != rows["existence_threshold=0.6"]


def test_the_best_threshold_is_the_lowest_of_highest_final(written, tmp_path):
    thresholds = calibrate(written.dataset, predict(tmp_path, written))
    fine = thresholds.at(np.linspace(0, 1, 2001))
    assert thresholds.best.final == pytest.approx(max(decision.final for decision in fine))
    assert thresholds.best.final > fine[0].final
    others = [one for one in fine if replace(one, threshold=thresholds.best.threshold) != thresholds.best]
    assert all(one.final < thresholds.best.final for one in others if one.threshold < thresholds.best.threshold)


def test_sentences_that_all_have_objects_have_no_n_acc():
    ones = np.ones(2)
    (decision,) = Thresholds([Undecided(True, ones * 0.5, ones, ones * 0, ones > 0)]).at([0.75])
    assert np.isnan(decision.n_acc)
    assert (decision.jf, decision.t_acc, decision.final) == (0.0, 0.0, 0.0)


def test_predictions_that_do_not_tell_are_refused(written, tmp_path):
    folder = predict(tmp_path, written)
    with pytest.raises(ValueError, match="no expression of 0 videos has a ground truth"):
        calibrate(written.dataset, folder, max_videos=0)
    first = read_expressions(written.dataset)[0]
    answers = folder / first.prediction_dir / "answers.json"
    answers.write_text(answers.read_text().replace("object_score", "another"))
    with pytest.raises(ValueError, match="without object scores; predict it anew"):
        calibrate(written.dataset, folder)
    answers.unlink()
    with pytest.raises(FileNotFoundError, match=r"answers\.json"):
        score_predictions(written.dataset, folder, Missing.zero, existence_threshold=0.5)
    identity = {"inference": {"existence_threshold": 0.5}}
    (folder / "predict.json").write_text(json.dumps({"identity": identity}))
    with pytest.raises(ValueError, match="emptied already; predict without it"):
        calibrate(written.dataset, folder)
    with pytest.raises(FileNotFoundError, match="no folder of predictions"):
        calibrate(written.dataset, tmp_path / "nowhere")
