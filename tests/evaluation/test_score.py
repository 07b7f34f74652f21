"""Scoring is strict, and its numbers depend on nothing but the masks."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glus.config import DatasetConfig, Missing
from glus.data.masks import encode_rle, pack_paths
from glus.data.parallel import map_in_processes
from glus.evaluation.baselines import compare_predictions
from glus.evaluation.report import Answer, ScoreReport, left_out, print_report, print_rows, write_report
from glus.evaluation.score import score_predictions
from glus.types import Video


def scores(report: ScoreReport) -> dict[str, tuple[float, float]]:
    return {f"{score.video}/{score.exp_id}": (score.j, score.f) for score in report.expressions}


def test_perfect_predictions(dataset: DatasetConfig, perfect: Path) -> None:
    report = score_predictions(dataset, perfect)
    assert list(scores(report)) == ["a/one/0", "a/one/1", "a/one/2", "a/one/10", "b/0"]
    assert set(scores(report).values()) == {(1.0, 1.0)}
    assert (report.mean_over_sentences.jf, report.mean_over_sentences.num_expressions) == (1.0, 5)
    assert (report.mean_over_sentences.no_target_accuracy, report.mean_over_sentences.target_accuracy) == (1.0, 1.0)
    assert report.problems == ()
    assert report.warnings == ()


def test_groups_and_overall_are_means_over_expressions(dataset: DatasetConfig, perfect: Path) -> None:
    for name in ("00000", "00005"):
        Image.fromarray(np.zeros((16, 20), np.uint8)).save(perfect / "a/one/0" / f"{name}.png")
    noise = np.zeros((16, 20), np.uint8)
    noise[0, 0] = 1
    for name in ("00000", "00005", "00010"):
        Image.fromarray(noise).save(perfect / "a/one/10" / f"{name}.png")
    report = score_predictions(dataset, perfect)
    assert scores(report)["a/one/0"] == (np.mean([0.0, 0.0, 1.0]),) * 2
    assert scores(report)["a/one/10"] == (0.0, 0.0)
    assert list(report.groups) == ["appearance", "multi", "absent"]
    assert report.groups["appearance"].j == np.mean([np.mean([0.0, 0.0, 1.0]), 1.0, 1.0])
    assert [group.num_expressions for group in report.groups.values()] == [3, 1, 1]
    assert report.mean_over_sentences.j == np.mean([np.mean([0.0, 0.0, 1.0]), 1.0, 1.0, 0.0, 1.0])
    assert report.mean_over_sentences.no_target_accuracy == 0.0
    assert math.isnan(report.groups["absent"].target_accuracy)


def test_no_groups(dataset: DatasetConfig, perfect: Path) -> None:
    dataset.groups = None
    assert score_predictions(dataset, perfect).groups == {}


def damage_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def damage_short(folder: Path) -> None:
    (folder / "00005.png").unlink()


def damage_size(folder: Path) -> None:
    Image.fromarray(np.zeros((20, 16), np.uint8)).save(folder / "00005.png")


def damage_bytes(folder: Path) -> None:
    data = (folder / "00005.png").read_bytes()
    (folder / "00005.png").write_bytes(data[: len(data) // 2])


def damage_empty(folder: Path) -> None:
    (folder / "00005.png").write_bytes(b"")


DAMAGES = [
    (damage_nothing_there, "tiny/a/one/1: no folder", 0.0),
    (damage_short, "tiny/a/one/1, frame 00005: .*00005.png is missing", 2 / 3),
    (damage_size, "tiny/a/one/1, frame 00005: .*00005.png is 20x16, .* 16x20", 2 / 3),
    (damage_bytes, "tiny/a/one/1, frame 00005: .*00005.png is not a readable PNG", 2 / 3),
    (damage_empty, "tiny/a/one/1, frame 00005: .*00005.png is not a readable PNG", 2 / 3),
]


@pytest.mark.parametrize(("damage", "message", "score"), DAMAGES)
def test_missing_predictions(damage, message: str, score: float, dataset: DatasetConfig, perfect: Path) -> None:
    damage(perfect / "a/one/1")

    zero = score_predictions(dataset, perfect, Missing.zero)
    assert scores(zero)["a/one/1"] == (pytest.approx(score), pytest.approx(score))
    assert zero.mean_over_sentences.j == pytest.approx((4 + score) / 5)
    assert (zero.mean_over_sentences.num_expressions, zero.mean_over_sentences.num_incomplete) == (5, 1)
    assert len(zero.problems) == 1
    with pytest.raises(ValueError, match=message.replace(": no folder", ", frame 00000: .* is missing")):
        score_predictions(dataset, perfect, Missing.error)

    drop = score_predictions(dataset, perfect, Missing.drop)
    assert (
        drop.mean_over_sentences.num_expressions,
        drop.mean_over_sentences.num_incomplete,
        drop.mean_over_sentences.j,
    ) == (4, 1, 1.0)
    assert (drop.groups["appearance"].num_expressions, drop.groups["appearance"].num_incomplete) == (2, 1)
    assert drop.problems == zero.problems


def test_a_missing_answer_is_not_an_empty_one(dataset: DatasetConfig, perfect: Path) -> None:
    shutil.rmtree(perfect / "a/one/10")
    report = score_predictions(dataset, perfect)
    assert scores(report)["a/one/10"] == (0.0, 0.0)
    assert report.expressions[3].answer is Answer.missing
    assert report.mean_over_sentences.no_target_accuracy == 0.0


def test_everything_dropped_has_no_mean(dataset: DatasetConfig, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    report = score_predictions(dataset, tmp_path / "nothing", Missing.drop)
    assert report.mean_over_sentences.num_expressions == 0
    assert math.isnan(report.mean_over_sentences.jf)
    write_report(report, tmp_path / "nothing")
    assert json.loads((tmp_path / "nothing" / "report.json").read_text())["mean_over_sentences"]["jf"] is None


def test_unexpected_predictions_are_listed(dataset: DatasetConfig, perfect: Path) -> None:
    shutil.copytree(perfect / "b/0", perfect / "b/7")
    shutil.copytree(perfect / "b/0", perfect / "other/video/0")
    shutil.copy(perfect / "b/0/00000.png", perfect / "b/0/00002.png")
    report = score_predictions(dataset, perfect)
    assert report.mean_over_sentences.jf == 1.0
    assert report.problems == ()
    assert report.warnings == (
        f"{perfect}/b/0: 1 PNGs of no frame, the first 00002.png",
        f"{perfect}/b/7: 2 PNGs of no expression",
        f"{perfect}/other/video/0: 2 PNGs of no expression",
    )


def test_the_folder_and_the_ground_truth_must_exist(dataset: DatasetConfig, perfect: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of predictions"):
        score_predictions(dataset, perfect / "misspelt")
    (Path(dataset.root) / "valid" / "mask_dict.json").unlink()
    for num_workers in (1, 2):
        with pytest.raises(FileNotFoundError, match=r"mask_dict\.json"):
            score_predictions(dataset, perfect, num_workers=num_workers)


def test_max_videos(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    report = score_predictions(dataset, perfect, max_videos=1)
    assert {score.video for score in report.expressions} == {"a/one"}
    assert report.warnings == ()  # predictions of the other videos are not unexpected
    file = io.StringIO()
    print_report(report, Console(width=100, file=file))
    assert "\nonly 1 of the split's 2 videos were scored (max_videos)\n" in file.getvalue()
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["num_videos"], written["num_videos_of_split"]) == (1, 2)
    assert left_out(written) == ["only 1 of the split's 2 videos were scored (max_videos)"]
    del written["num_videos"], written["num_videos_of_split"]
    assert left_out(written) == [], "a report of before 2026-12"


def test_any_nonzero_pixel_is_foreground(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = {path.relative_to(perfect): rng.random((16, 20)) < 0.3 for path in perfect.rglob("a/one/*/*.png")}
    results = []
    for number, scale in enumerate((1, 3, 255)):
        for name, mask in masks.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * np.uint8(scale)).save(path)
        results.append(scores(score_predictions(dataset, tmp_path / str(number), max_videos=1)))
    assert results[0] == results[1] == results[2]


def test_long_videos_are_scored_in_chunks(dataset: DatasetConfig, perfect: Path, monkeypatch) -> None:
    damage_short(perfect / "a/one/1")
    whole = score_predictions(dataset, perfect)
    monkeypatch.setattr("glus.evaluation.score.CHUNK_FRAMES", 2)
    assert score_predictions(dataset, perfect) == whole


def test_worker_count_changes_nothing(dataset: DatasetConfig, perfect: Path) -> None:
    damage_short(perfect / "a/one/1")
    reports = [score_predictions(dataset, perfect, num_workers=number) for number in (1, 2, 5)]
    assert reports[0] == reports[1] == reports[2]
    with pytest.raises(ValueError, match="a/one/1, frame 00005"):
        score_predictions(dataset, perfect, Missing.error, num_workers=2)


def test_a_dead_worker_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match="a worker process died"):
        list(map_in_processes(os._exit, [9, 9], 2))


@pytest.mark.parametrize("module", ["score", "baselines"])
def test_masks_are_packed_once_before_processes_start(
    module: str, dataset: DatasetConfig, perfect: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing takes much memory, which every process would take at the same time."""
    packed = pack_paths(Path(dataset.root) / "valid/mask_dict.json")[0]
    packed.unlink()

    def start(worker: Callable[[Video], Any], videos: list[Video], num_workers: int) -> Iterator[Any]:
        assert packed.is_file()
        return map_in_processes(worker, videos, num_workers)

    monkeypatch.setattr(f"glus.evaluation.{module}.map_in_processes", start)
    if module == "score":
        score_predictions(dataset, perfect, num_workers=2)
    else:
        compare_predictions(dataset, {"m": perfect}, num_workers=2)


def test_report_files_and_table(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    damage_short(perfect / "a/one/1")
    report = score_predictions(dataset, perfect)
    write_report(report, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["per_expression.csv", "report.json"]
    summary = json.loads((tmp_path / "report" / "report.json").read_text())
    assert summary["mean_over_sentences"]["jf"] == 100 * report.mean_over_sentences.jf
    assert summary["groups"]["multi"]["num_expressions"] == 1
    assert summary["missing"] == "zero"
    assert summary["problems"] == list(report.problems)
    rows = list(csv.DictReader((tmp_path / "report" / "per_expression.csv").open()))
    assert [float(row["j"]) for row in rows] == [score.j for score in report.expressions]
    assert [row["exp_id"] for row in rows] == ["0", "1", "2", "10", "0"]
    console = Console(record=True, width=100, file=(tmp_path / "log").open("w"))
    print_report(report, console)
    text = console.export_text()
    assert "mean over sentences" in text
    assert "93.33" in text
    assert "00005.png is missing" in text


def paint(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_grey_predictions_are_counted(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    """Whatever is not 0 is foreground, as ever; but it is said how many files that may be wrong for."""
    assert score_predictions(dataset, perfect).doubts == ()
    for frame in ("00000", "00005"):
        path = perfect / "a/one/0" / f"{frame}.png"
        paint(path, np.asarray(Image.open(path)) // 2 + 12)
    paint(perfect / "b/0/00001.png", np.full((12, 14), 255))
    report = score_predictions(dataset, perfect, num_workers=2)
    assert scores(report)["a/one/0"][0] == pytest.approx((2 * 20 / 320 + 1) / 3)
    assert report.problems == ()
    values, full = report.doubts
    assert values.startswith("2 masks hold more values than 0 and one other")
    assert values.endswith(f"first: {perfect}/a/one/0/00000.png")
    assert full == "3 masks cover the whole frame; the first: tiny/a/one/0, frame 00000"
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["doubts"] == [values, full]
    file = io.StringIO()
    print_report(report, Console(width=80, file=file))
    assert f"warning: {values}" in file.getvalue()


def test_a_full_mask_of_an_object_that_fills_the_frame_is_right(dataset: DatasetConfig, perfect: Path) -> None:
    path = Path(dataset.root) / "valid/mask_dict.json"
    content = json.loads(path.read_text())
    content["2"] = [{"size": [12, 14], "counts": encode_rle(np.ones((12, 14)))}] * 2
    path.write_text(json.dumps(content))
    for frame in ("00000", "00001"):
        paint(perfect / f"b/0/{frame}.png", np.full((12, 14), 255))
    report = score_predictions(dataset, perfect)
    assert scores(report)["b/0"] == (1, 1)
    assert report.doubts == ()


@pytest.mark.parametrize("damage", ["bomb", "truth"])
def test_what_cannot_be_read_does_not_stop_what_can(
    damage: str, dataset: DatasetConfig, perfect: Path, tmp_path: Path, monkeypatch
) -> None:
    split = Path(dataset.root) / "valid"
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(split / "JPEGImages/a/one/00000.jpg")
    else:
        content = json.loads((split / "mask_dict.json").read_text())
        content["1"][1]["counts"] = "0"
        (split / "mask_dict.json").write_text(json.dumps(content))
    report = score_predictions(dataset, perfect)
    if damage == "bomb":
        assert list(scores(report)) == ["b/0"]
        assert len(report.unscorable) == 1
        assert report.unscorable[0].startswith("tiny/a/one: ")
    else:  # of the object of two sentences
        assert scores(report) == dict.fromkeys(("a/one/0", "a/one/10", "b/0"), (1.0, 1.0))
        for line, exp_id in zip(report.unscorable, ("1", "2"), strict=True):
            assert line.startswith(f"tiny/a/one/{exp_id}: mask of tiny/a/one/{exp_id}, frame 00005, annotation 1 in ")
        with pytest.raises(ValueError, match="missing=error stops"):
            score_predictions(dataset, shutil.copytree(perfect / "b", tmp_path / "pred/b").parent, Missing.error)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["unscorable"] == list(report.unscorable)


def test_half_a_character_in_a_sentence_does_not_stop_scoring(
    dataset: DatasetConfig, perfect: Path, tmp_path: Path
) -> None:
    path = Path(dataset.root) / "valid/meta_expressions.json"
    path.write_text(path.read_text().replace("sentence 10", "sentence \\ud83d"))
    write_report(score_predictions(dataset, perfect), tmp_path)
    assert r"sentence \ud83d" in (tmp_path / "per_expression.csv").read_text()


def test_a_table_shows_brackets_as_they_are() -> None:
    """Of a folder's name, say, or of an interval."""
    file = io.StringIO()
    print_rows(Console(width=80, file=file), "[t]", "kind", {"[a]": {"[c]": "out/[bold]x"}, "b": {"[c]": "1 [+2, +3]"}})
    assert all(text in file.getvalue() for text in ("[t]", "[a]", "[c]", "out/[bold]x", "1 [+2, +3]"))
