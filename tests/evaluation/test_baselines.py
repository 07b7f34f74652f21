"""The comparison with sentence-blind answers, on a benchmark whose scores are known by hand."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glus.config import DatasetConfig, Layout, Protocol
from glus.data.benchmarks.index import read_expressions
from glus.evaluation.baselines import (
    ROWS,
    compare_predictions,
    margin,
    print_comparison,
    rows_as_csv,
    summary,
)
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.evaluation.score import score_predictions
from tests.edits import edit_json
from tests.evaluation.predicted import true_masks, write_png
from tests.layouts import WRITERS

ONE_OF_TWO = 100 * (1 / 2 + 2 / 3) / 2
"""J&F between one box and two equal boxes: J 1/2; precision 1 and recall 1/2, or the reverse, hence F 2/3."""
EXPECTED = {
    # a/one/0, a/one/1: two objects, the other sentence gets 0; b/0: its only object, and nobody else's sentence
    "appearance": {
        "model": 100.0,
        "all_objects": (2 * ONE_OF_TWO + 100) / 3,
        "random_object": (50 + 50 + 100) / 3,
        "other_sentence": 0.0,
        "empty": (0 + 0 + 50) / 3,
        "margin": 100 - (2 * ONE_OF_TWO + 100) / 3,
    },
    "multi": {
        "model": 100.0,
        "all_objects": 100.0,
        "random_object": ONE_OF_TWO,
        "other_sentence": None,
        "empty": 0.0,
        "margin": 0.0,
    },
    "absent": {
        "model": 100.0,
        "all_objects": 0.0,
        "random_object": 0.0,
        "other_sentence": 0.0,
        "empty": 100.0,
        "margin": 100.0,
    },
}
for rows in EXPECTED.values():
    rows |= {"both_look_alikes": None, "random_look_alike": None, "ceiling": None, "oracle": 100.0}
COLUMNS = (*ROWS, "margin")


def mean(kinds: tuple[str, ...], row: str) -> float | None:
    found = [value for kind in kinds if (value := EXPECTED[kind][row]) is not None]
    return float(np.mean(found)) if found else None


def test_known_answers(dataset: DatasetConfig, perfect: Path) -> None:
    result = summary(compare_predictions(dataset, {"perfect": perfect}))
    assert list(result) == ["appearance", "multi", "absent", "mean_over_kinds", "mean_over_kinds_but_absent"]
    expected = dict(EXPECTED)
    expected["mean_over_kinds"] = {row: mean(("appearance", "multi", "absent"), row) for row in COLUMNS}
    expected["mean_over_kinds_but_absent"] = {row: mean(("appearance", "multi"), row) for row in COLUMNS}
    for kind, rows in expected.items():
        assert list(result[kind]) == list(COLUMNS)
        assert result[kind] == {row: None if value is None else pytest.approx(value) for row, value in rows.items()}


def test_expressions_without_a_row_are_counted(dataset: DatasetConfig, perfect: Path) -> None:
    comparison = compare_predictions(dataset, {"perfect": perfect})["perfect"]
    excluded = {
        kind: {row: n for row, n in rows.items() if row == "other_sentence"}
        for kind, rows in comparison.excluded().items()
    }
    assert excluded == {"appearance": {"other_sentence": 1}, "multi": {"other_sentence": 1}, "absent": {}}


def test_look_alikes_ceiling_and_oracle(dataset: DatasetConfig, perfect: Path) -> None:
    """a/one/0 and 1 are look-alikes, told apart in frame 1: local windows decide frames 1 and 2, not frame 0."""
    folder = Path(dataset.root) / "valid"
    (folder / "evidence.json").write_text(json.dumps({"a/one": {"0": [1], "1": [1]}}))
    dataset.evidence = "evidence.json"
    frames = {"num_context": 0, "num_query": 2, "query_sampling": "consecutive"}
    settings = {"frames": frames, "inference": {"window": "sliding"}, "model": {"memory": {"enabled": False}}}
    (perfect / "predict.json").write_text(json.dumps({"identity": {**settings, "key_frames": None}}))
    shutil.rmtree(perfect / "a/one/0")
    shutil.copytree(perfect / "a/one/1", perfect / "a/one/0")  # the wrong look-alike
    comparison = compare_predictions(dataset, {"m": perfect}, max_videos=1)["m"]
    rows = dict(zip((e.exp_id for e in comparison.expressions), comparison.scores, strict=True))
    assert rows["0"]["model"] == 0.0
    assert rows["0"]["both_look_alikes"] == pytest.approx(ONE_OF_TWO / 100)
    assert rows["0"]["random_look_alike"] == 0.5
    assert rows["0"]["ceiling"] == pytest.approx((ONE_OF_TWO / 100 + 1 + 1) / 3)
    assert rows["0"]["oracle"] == pytest.approx(ONE_OF_TWO / 100), "its best answer is the one about both"
    assert rows["1"]["oracle"] == 1.0
    assert "both_look_alikes" not in rows["2"]
    assert [None if chosen is None else chosen.tolist() for chosen in comparison.chosen] == [
        [False] * 3,
        [True] * 3,
        None,
        None,
    ]
    table = comparison.table()
    assert table["appearance"]["margin"] == pytest.approx(50 - ONE_OF_TWO)
    assert table["mean_over_kinds"]["both_look_alikes"] is None, "not every kind has look-alikes"
    (perfect / "predict.json").write_text(json.dumps({"identity": {**settings, "key_frames": "a hash"}}))
    starts = {"m": {e.name: 2 for e in read_expressions(dataset)}}
    given = compare_predictions(dataset, {"m": perfect}, max_videos=1, given_starts=starts)["m"]
    chosen = compare_predictions(dataset, {"m": perfect}, max_videos=1)["m"]
    assert [each.decided[0].tolist() for each in (given, chosen)] == [[True, True, False], [True] * 3]
    assert chosen.scores[0]["ceiling"] == 1.0
    (perfect / "predict.json").unlink()
    unknown = compare_predictions(dataset, {"m": perfect}, max_videos=1)["m"]
    assert "ceiling" not in unknown.scores[0]


def test_other_sentence_is_the_models_own_answer(dataset: DatasetConfig, perfect: Path) -> None:
    """A model that always answers with the left box: right for a/one/0, and for "another sentence" of it."""
    for exp_id in ("1", "2", "10"):
        shutil.rmtree(perfect / "a/one" / exp_id)
        shutil.copytree(perfect / "a/one/0", perfect / "a/one" / exp_id)
    comparison = compare_predictions(dataset, {"left": perfect}, max_videos=1)["left"]
    rows = {e.exp_id: scores for e, scores in zip(comparison.expressions, comparison.scores, strict=True)}
    assert (rows["0"]["model"], rows["0"]["other_sentence"]) == (1.0, 1.0)
    assert (rows["1"]["model"], rows["1"]["other_sentence"]) == (0.0, 0.0)
    assert rows["2"]["model"] == pytest.approx(ONE_OF_TWO / 100)
    assert "other_sentence" not in rows["2"]
    assert (rows["10"]["model"], rows["10"]["other_sentence"]) == (0.0, 0.0)


def test_two_models(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    shutil.copytree(perfect, tmp_path / "worse")
    for name in ("00000", "00001"):
        Image.fromarray(np.zeros((12, 14), np.uint8)).save(tmp_path / "worse/b/0" / f"{name}.png")
    comparisons = compare_predictions(dataset, {"worse": tmp_path / "worse", "perfect": perfect})
    result = summary(comparisons)
    assert result["appearance"]["model"] == pytest.approx((100 + 100 + 50) / 3)
    assert list(result["other_models"]) == ["perfect"]
    assert result["other_models"]["perfect"]["appearance"]["model"] == 100.0
    rows = list(csv.DictReader(rows_as_csv(comparisons).splitlines()))
    assert len(rows) == 10
    assert {row["model_label"] for row in rows} == {"worse", "perfect"}
    assert [row["other_sentence"] for row in rows[:5]] == ["0.0", "0.0", "", "0.0", ""]


def test_chunks_and_workers_change_nothing(dataset: DatasetConfig, perfect: Path, monkeypatch) -> None:
    whole = summary(compare_predictions(dataset, {"m": perfect}))
    assert summary(compare_predictions(dataset, {"m": perfect}, num_workers=2)) == whole
    monkeypatch.setattr("glus.evaluation.score.CHUNK_FRAMES", 2)
    assert summary(compare_predictions(dataset, {"m": perfect})) == whole


def test_incomplete_predictions_are_an_error(dataset: DatasetConfig, perfect: Path) -> None:
    (perfect / "b/0/00001.png").unlink()
    with pytest.raises(ValueError, match=r"tiny/b/0, frame 00001: .* is missing"):
        compare_predictions(dataset, {"m": perfect})
    with pytest.raises(FileNotFoundError, match="no folder of predictions"):
        compare_predictions(dataset, {"m": perfect / "misspelt"})
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_predictions(dataset, {})


@pytest.mark.parametrize("layout", [Layout.reason_vos, Layout.reason_seg])
def test_what_has_no_truth_does_not_count(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the model is its score: over the same frames, pixels and sentences."""
    written = WRITERS[layout](tmp_path / "data", "val")
    dataset, masks = written.dataset, true_masks(written)
    if layout is Layout.reason_vos:
        for name, frames in {
            "MOSE_reason0_1": (0, 1, 3),
            "MOSE_reason0_2": (0, 1),
            "BURST_reason1_1": range(5),
        }.items():
            for frame in frames:
                (tmp_path / "data/Annotations" / name / f"{frame:05d}.png").unlink()
    else:
        dataset.protocol = Protocol.images
        edit_json(tmp_path / "data/val/val_0.json", lambda content: content.update(shapes=[]))
    for mask_THW in masks.values():
        mask_THW[:, ::2] ^= True
    folder = write_png(tmp_path / "predictions", dataset, masks)
    monkeypatch.setattr("glus.evaluation.score.CHUNK_FRAMES", 2)  # the first two frames of reason0 have no truth
    compared, report = compare_predictions(dataset, {"m": folder})["m"], score_predictions(dataset, folder)
    found = {
        f"{e.video}/{e.exp_id}": rows["model"] for e, rows in zip(compared.expressions, compared.scores, strict=True)
    }
    assert found == {f"{one.video}/{one.exp_id}": pytest.approx(one.jf) for one in report.expressions}
    assert compared.num_without_truth == len(report.without_truth) > 0
    file = io.StringIO()
    print_comparison("m", compared, Console(width=200, file=file))
    assert f"{compared.num_without_truth} expressions without ground truth, left out" in file.getvalue()


def test_sentences_with_annotations_of_their_own_can_be_about_one_object(tmp_path: Path) -> None:
    """Eleven sentences about three objects; and objects that have an annotation for each interval."""
    written = WRITERS[Layout.ref_youtube_vos_valid](tmp_path / "youtube", "valid")
    folder = write_png(tmp_path / "youtube_pngs", written.dataset, true_masks(written))
    compared = compare_predictions(written.dataset, {"m": folder}, max_videos=1)["m"]
    objects_OTHW = [written.truth["valid0", str(number)].masks_THW for number in range(3)]
    jf_OO = [[np.mean([region_similarity(a, b), boundary_accuracy(a, b)]) for a in objects_OTHW] for b in objects_OTHW]
    for number, rows in enumerate(compared.scores):
        own, others = number % 3, [other % 3 for other in range(11) if other % 3 != number % 3]
        assert rows["random_object"] == pytest.approx(np.mean(jf_OO[own]))
        assert rows["other_sentence"] == pytest.approx(np.mean([jf_OO[own][other] for other in others]))

    written = WRITERS[Layout.groundmore](tmp_path / "groundmore", "trainval")
    masks = true_masks(written)

    def ask_again(content: dict[str, Any]) -> None:
        for video, entry in content["videos"].items():
            entry["questions"]["2"] = {**entry["questions"]["0"], "action_end": "01:02"}
            masks[video, "2"] = masks[video, "0"] & (np.arange(24) < 12)[:, None, None]

    edit_json(tmp_path / "groundmore/trainval_v2.json", ask_again)
    folder = write_png(tmp_path / "groundmore_pngs", written.dataset, masks)
    compared = compare_predictions(written.dataset, {"m": folder}, max_videos=1)["m"]
    told, again = ([*compared.scores][number]["other_sentence"] for number in (0, 2))
    jf = [
        float(np.mean([f(masks[video, "1"], masks[video, number]) for f in (region_similarity, boundary_accuracy)]))
        for video, number in ((compared.expressions[0].video, number) for number in "02")
    ]
    assert [told, again] == pytest.approx(jf), "object 1 is that of both, only 2 and 3 are others"


def test_without_groups_there_is_one_kind(dataset: DatasetConfig, perfect: Path) -> None:
    dataset.groups = None
    result = summary(compare_predictions(dataset, {"m": perfect}))
    assert list(result) == ["all", "mean_over_kinds", "mean_over_kinds_but_absent"]
    assert result["all"] == result["mean_over_kinds"]


def test_margin_and_table(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    assert margin({"model": 60.0, "all_objects": 20.0, "random_object": 30.0, "other_sentence": None}) == 30.0
    assert margin({"model": None, "all_objects": 20.0, "random_object": 30.0, "other_sentence": None}) is None
    console = Console(record=True, width=100, file=(tmp_path / "log").open("w"))
    print_comparison("perfect", compare_predictions(dataset, {"m": perfect})["m"], console)
    text = console.export_text()
    assert "mean over kinds but absent" in text
    assert "margin" in text
    assert "multi: 1 expressions have no other_sentence" in text
