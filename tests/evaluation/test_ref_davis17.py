"""Ref-DAVIS17's two protocols give different numbers, each the right one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment

from glus.config import Layout, Missing, Protocol
from glus.data.benchmarks.index import read_expressions
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.evaluation.protocols import ANNOTATORS, annotator
from glus.evaluation.report import ScoreReport
from glus.evaluation.score import score_predictions
from tests.evaluation.predicted import Masks, true_masks, write_png
from tests.layouts import WRITERS, Written
from tests.layouts.davis17 import VOID_ROWS

VIDEOS = ("valid-0", "valid-1")


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Two videos of three objects with four sentences each; the lowest rows are void."""
    found = WRITERS[Layout.ref_davis17](tmp_path / "davis", "valid")
    return replace(found, dataset=replace(found.dataset, protocol=Protocol.ref_davis17))


def protocol_a(report: ScoreReport) -> dict[str, dict[str, float]]:
    (table,) = report.tables
    assert "protocol A" in table.title
    return table.rows


def test_two_protocols_two_numbers(written: Written, tmp_path: Path) -> None:
    """Sentence 4 (k - 1) + a is annotator a's about object k."""
    truth, masks = true_masks(written), true_masks(written)
    first, second = VIDEOS
    masks[first, "0"], masks[first, "4"] = truth[first, "4"], truth[first, "0"]  # annotator 0 swaps objects 1 and 2
    masks[first, "5"] = truth[first, "5"] | truth[first, "1"]  # annotator 1: object 2 is said to cover object 1
    masks[second, "2"][:, -VOID_ROWS:] = True  # annotator 2: object 1 reaches into what is void
    masks[second, "11"][:] = False  # annotator 3 does not find object 3
    report = score_predictions(written.dataset, write_png(tmp_path / "predictions", written.dataset, masks))

    rows = protocol_a(report)
    for number, expected in enumerate((1, 1, 1, 5 / 6)):
        assert rows[ANNOTATORS[number]] == pytest.approx({"J": expected, "F": expected, "J&F": expected, "objects": 6})
    assert rows["mean of the four annotators"]["J&F"] == pytest.approx(23 / 24)

    alone = {(one.video, one.exp_id): one.j for one in report.expressions}
    wrong = {key: j for key, j in alone.items() if j < 1}
    covered, reaching = ((first, "5"), (second, "2"))
    assert wrong == {
        (first, "0"): 0.0,
        (first, "4"): 0.0,
        covered: np.mean(truth[covered].sum((1, 2)) / masks[covered].sum((1, 2))),
        reaching: np.mean(truth[reaching].sum((1, 2)) / masks[reaching].sum((1, 2))),
        (second, "11"): 0.0,
    }
    assert report.mean_over_sentences.j == np.mean(list(alone.values()))
    assert "protocol B" in report.protocol
    assert [(s.object_id, s.proposal) for s in report.objects[:3]] == [(2, 1), (1, 2), (3, 3)]


def plain_protocol_a(written: Written, masks: Masks, number: int) -> tuple[float, float]:
    """Mean J and F of one annotator, merged into pictures of ids and scored as davis2017-evaluation does."""
    j, f = [], []
    for video in VIDEOS:
        ids = np.zeros(masks[video, "0"].shape, np.uint8)
        for object_id in (3, 2, 1):
            ids[masks[video, str(4 * (object_id - 1) + number)]] = object_id
        truths = [written.truth[video, str(4 * k)] for k in range(3)]
        void = truths[0].ignore_THW
        proposals = [ids == k + 1 for k in range(max(int(ids.max()), len(truths)))]
        cells = [
            [(region_similarity(p, t.masks_THW, void), boundary_accuracy(p, t.masks_THW, void)) for t in truths]
            for p in proposals
        ]
        means = np.mean(np.array(cells), axis=3)  # (P, G, 2)
        matched = linear_sum_assignment(-(means[..., 0] + means[..., 1]) / 2)
        j += means[..., 0][matched].tolist()
        f += means[..., 1][matched].tolist()
    return float(np.mean(j)), float(np.mean(f))


@pytest.mark.parametrize("chunk", [2, 32])
def test_protocol_a_equals_the_plain_procedure(chunk: int, written: Written, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("glus.evaluation.score.CHUNK_FRAMES", chunk)
    rng = np.random.default_rng(0)
    shifts = {key: rng.integers(-4, 5, 2) for key in written.truth}
    masks = {key: np.roll(mask, shifts[key], axis=(1, 2)) for key, mask in true_masks(written).items()}
    for video in VIDEOS:
        masks[video, "10"][:] = False  # the annotator has fewer proposals than there are objects
    report = score_predictions(written.dataset, write_png(tmp_path / "predictions", written.dataset, masks))
    for number, name in enumerate(ANNOTATORS):
        j, f = plain_protocol_a(written, masks, number)
        assert (protocol_a(report)[name]["J"], protocol_a(report)[name]["F"]) == (j, f)
        assert 0.1 < j < 0.9


def test_what_is_missing_costs_its_object(written: Written, tmp_path: Path) -> None:
    folder = write_png(tmp_path / "predictions", written.dataset, true_masks(written))
    (folder / "valid-0/4/00002.png").unlink()
    report = score_predictions(written.dataset, folder)
    assert protocol_a(report)[ANNOTATORS[0]]["J"] == pytest.approx((5 + 4 / 5) / 6)
    assert protocol_a(report)[ANNOTATORS[1]]["J"] == 1
    dropped = protocol_a(score_predictions(written.dataset, folder, Missing.drop))
    assert [dropped[name]["objects"] for name in ANNOTATORS] == [3, 6, 6, 6]
    assert dropped[ANNOTATORS[0]]["J"] == 1


def test_an_object_that_comes_in_later_is_scored_by_protocol_b_alone(written: Written, tmp_path: Path) -> None:
    path = Path(written.dataset.root) / "valid/Annotations/valid-0/00000.png"
    ids = np.array(Image.open(path))
    ids[ids == 3] = 0
    Image.fromarray(ids).save(path)
    folder = write_png(tmp_path / "predictions", written.dataset, true_masks(written))
    (folder / "valid-0/8/00002.png").unlink()
    report = score_predictions(written.dataset, folder)
    assert [(s.object_id, s.j) for s in report.objects[:4]] == [(1, 1.0), (2, 1.0)] * 2
    assert [one.j for one in report.expressions[7:10]] == [1.0, 0.6, 0.8]


def test_a_sentence_must_say_whose_it_is(written: Written) -> None:
    expression = read_expressions(written.dataset)[5]
    assert annotator(expression) == 1
    with pytest.raises(ValueError, match=r"ref_davis17/valid-0/6 about object \[1\]: expected .* 4 \* \(object - 1\)"):
        annotator(replace(expression, exp_id="6", object_ids=(1,)))
