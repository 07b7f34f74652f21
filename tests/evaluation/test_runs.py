"""Scored runs against each other: tables, intervals, and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glus.config import DatasetConfig, Layout, Missing
from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.predictions import write_answers
from glus.evaluation.baselines import compare_predictions
from glus.evaluation.page import build_page, open_sources, training_curves
from glus.evaluation.report import print_report, write_report
from glus.evaluation.runs import (
    ScoredRun,
    SentenceScore,
    compare_runs,
    different_settings,
    doubts,
    most_changed,
    paired_difference,
    print_runs,
    read_run,
    read_runs,
)
from glus.evaluation.score import score_predictions
from glus.models.glus import memory_frames
from tests.edits import edit_json
from tests.evaluation.predicted import true_masks, write_png
from tests.layouts import SIZE, WRITERS

SETTINGS = {
    "key_frames": None,
    "frames": {"num_context": 2, "num_query": 2, "query_sampling": "consecutive"},
    "inference": {"window": "sliding", "memory_stride": 1},
    "model": {"memory": {"num_frames": 2, "enabled": True}},
}


def run_of(label: str, scores: dict[str, float]) -> ScoredRun:
    rows = {name: SentenceScore(name.split("/")[0], name, "k", score) for name, score in scores.items()}
    return ScoredRun(label, Path(label), rows, {}, {}, {})


def finish(folder: Path, dataset: DatasetConfig, stride: int) -> Path:
    """Score predictions, and put beside them what ``predict.py`` would have."""
    for expression in read_expressions(dataset):
        place = folder / expression.prediction_dir
        areas = [float(np.mean(np.array(Image.open(place / f"{frame}.png")) > 0)) for frame in expression.frames]
        answers = zip(expression.frames, areas, strict=True)
        write_answers(place, ({"frame": f, "score": 0.75, "has_seg": True, "area": area} for f, area in answers))
    report = score_predictions(dataset, folder, Missing.zero, 1, None)
    write_report(report, folder)
    identity = {**SETTINGS, "inference": {**SETTINGS["inference"], "memory_stride": stride}}  # type: ignore[dict-item]
    (folder / "predict.json").write_text(json.dumps({"identity": identity, "weights": "nowhere", "run": {}}))
    summary = {"frames": 5, "elapsed": 1.0, "seconds": {"llm": 0.25}}
    (folder / "cost.json").write_text(json.dumps(summary))
    os.utime(folder / "cost.json", (0, 0))
    return folder


@pytest.fixture
def runs(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> list[ScoredRun]:
    """One that misses an object in the second video, and a perfect one."""
    worse = tmp_path / "worse"
    shutil.copytree(perfect, worse)
    for file in (worse / "b").rglob("*.png"):
        Image.fromarray(np.zeros((12, 14), np.uint8)).save(file)
    return read_runs([finish(worse, dataset, 1), finish(perfect, dataset, 3)])


def test_the_interval_is_that_of_videos_drawn_again() -> None:
    first = run_of("a", {"u/0": 10, "u/1": 10, "v/0": 10, "w/0": 10})
    second = run_of("b", {"u/0": 20, "u/1": 20, "v/0": 10, "w/0": 10})
    found = paired_difference(first, second, list(first.scores))
    assert found.mean == 5
    assert (found.low, found.high) == (0, 10)  # all draws: u never (8 of 27) or always (1 of 27) among three videos
    assert paired_difference(first, second, list(first.scores)) == found
    alone = paired_difference(first, second, ["u/0", "u/1"])
    assert (alone.mean, alone.low, alone.high) == (10, -math.inf, math.inf)
    assert paired_difference(second, first, list(first.scores)).mean == -5


def test_each_kind_counts_the_same_in_the_mean_over_kinds() -> None:
    """In the interval, too: of two videos, the one that differs is drawn never, once, or twice."""
    names = ("u/0", "u/1", "u/2", "v/0", "v/2")
    first, second = (run_of(label, dict.fromkeys(names, 10.0)) for label in "ab")
    second.scores["u/2"] = replace(second.scores["u/2"], jf=40.0)  # type: ignore[index]
    found = paired_difference(first, second, ["u/0", "u/1", "v/0"], ["u/2", "v/2"])
    assert (found.mean, found.low, found.high) == (7.5, 0, 15)
    assert paired_difference(first, second, names).mean == 6


def test_both_means_agree_with_score_and_the_table_can_be_read(runs: list[ScoredRun], dataset: DatasetConfig) -> None:
    """B8: one name for each mean, in percent, in every program."""
    console = Console(width=120, file=io.StringIO())
    print_runs(console, runs, num_sentences=1)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    scored = Console(width=120, file=io.StringIO())
    print_report(score_predictions(dataset, runs[0].folder), scored)
    blind = compare_predictions(dataset, {"worse": runs[0].folder})["worse"].table()["mean_over_kinds"]["model"]
    for row in compare_runs(runs)[-2:]:
        assert re.search(rf"{row.name} +5 +{row.means[0]:.1f} +100.0 +\+", text)
        assert isinstance(scored.file, io.StringIO)
        assert re.search(rf"{row.name} .* {row.means[0]:.2f} ", scored.file.getvalue())
        key = row.name.replace(" ", "_")
        assert runs[0].report[key]["jf"] == pytest.approx(row.means[0])
    assert blind == pytest.approx(row.means[0])
    assert max(map(len, text.splitlines())) <= 120
    assert "Sentences that changed most, worse -> perfect:\n +" in text


def test_only_sentences_that_all_runs_have_are_compared() -> None:
    first, second = run_of("a", {"u/0": 1, "v/0": 2}), run_of("b", {"v/0": 4})
    rows = compare_runs([first, second])
    assert [(row.name, row.num_sentences, row.means) for row in rows] == [
        ("k", 1, [2, 4]),
        ("mean over sentences", 1, [2, 4]),
        ("mean over kinds", 1, [2, 4]),
    ]
    with pytest.raises(ValueError, match="a, d have no sentence in common"):
        compare_runs([first, run_of("d", {"x/0": 1})])
    third = run_of("c", {"u/0": 1.5, "v/0": 9})
    assert most_changed(first, third, ["u/0", "v/0"]) == ["v/0", "u/0"]


def test_runs_are_read_and_told_apart(runs: list[ScoredRun]) -> None:
    assert [run.label for run in runs] == ["worse", "perfect"]
    assert different_settings(runs) == {"inference.memory_stride": ["1", "3"]}
    rows = compare_runs(runs)
    assert [row.name for row in rows] == ["appearance", "multi", "absent", "mean over sentences", "mean over kinds"]
    assert [row.means[1] for row in rows] == [100] * 5


def test_what_the_means_leave_out_is_said(dataset: DatasetConfig, runs: list[ScoredRun]) -> None:
    masks = Path(dataset.root) / "valid/mask_dict.json"
    kept = masks.read_text()
    edit_json(masks, lambda content: content["2"].append(None))
    finish(runs[1].folder, dataset, 3)
    masks.write_text(kept)
    found = read_runs([run.folder for run in runs])
    lines = [
        "perfect: 1 videos or sentences could not be scored (unscorable in report.json)",
        "1 of 5 sentences are not in the means of every run, and left out",
    ]
    assert doubts(found) == lines
    console = Console(width=200, file=io.StringIO())
    print_runs(console, found, num_sentences=1)
    assert isinstance(console.file, io.StringIO)
    assert f"warning: {lines[0]}\nwarning: {lines[1]}\n" in console.file.getvalue()
    assert lines[1] in build_page(dataset, found, memory_frames, num_sentences=1)
    assert doubts(runs) == []


def test_scores_are_read_back_whatever_they_hold(dataset: DatasetConfig, perfect: Path) -> None:
    report = score_predictions(dataset, perfect)
    first, *others = report.expressions
    for text in ("a\rb", "a\nb", "a\r\nb", 'a, "b"', "\u2028"):
        write_report(replace(report, expressions=(replace(first, text=text), *others)), perfect)
        assert [score.text for score in read_run(perfect).scores.values()] == [text, *(one.text for one in others)]
    problems = tuple(f"frame {frame:05d}: no such file" for frame in range(9000))
    write_report(replace(report, expressions=(replace(first, problems=problems), *others)), perfect)
    file = perfect / "per_expression.csv"
    (row, *_) = csv.DictReader(file.read_text().splitlines())
    assert row["num_problems"] == "9000"
    file.write_text(file.read_text().replace(",9000\n", f",{'; '.join(problems)}\n"))  # as before 2026-12
    assert "; frame 08999: no such file\n" in file.read_text()
    edit_json(perfect / "report.json", lambda content: content.pop("per_expression_sha256"))
    assert len(read_run(perfect).scores) == 5


def test_scores_that_are_not_of_one_scoring_are_refused(dataset: DatasetConfig, runs: list[ScoredRun]) -> None:
    """Scoring was killed between the two files; or the predictions went on after it."""
    worse, perfect = (run.folder for run in runs)
    shutil.copy(worse / "per_expression.csv", perfect)
    with pytest.raises(ValueError, match=r"report.json and per_expression.csv .* are not of one scoring: score it"):
        read_run(perfect)
    assert read_run(worse).scores
    (worse / "per_object.csv").touch()
    write_report(score_predictions(dataset, worse), worse)
    assert not (worse / "per_object.csv").exists(), "of an earlier protocol"
    os.utime(worse / "cost.json", ns=(0, 2**62))
    assert doubts([read_run(worse)]) == [
        "worse: cost.json is newer than report.json; if more was predicted since it was scored, score it again"
    ]


def test_the_cost_is_found_under_its_former_name(runs: list[ScoredRun]) -> None:
    folder = runs[0].folder
    assert runs[0].cost["seconds"] == {"llm": 0.25}
    (folder / "cost.json").rename(folder / "summary.json")
    assert read_run(folder).cost == runs[0].cost


def test_a_training_that_is_not_recorded_is_one_line(runs: list[ScoredRun], tmp_path: Path) -> None:
    trained = []
    for name, config in {"export": "model: {}", "long": "trainer: {steps: 9, seed: 0}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        (tmp_path / name / "config.yaml").write_text(config)
        trained.append(replace(runs[0], made_by={"weights": str(tmp_path / name)}))
    assert different_settings(trained) == {"train": ["not recorded", "recorded"]}
    (tmp_path / "export" / "config.yaml").write_text("trainer: {steps: 3, seed: 0}")
    assert different_settings(trained) == {"train.trainer.steps": ["3", "9"]}


def test_a_training_that_goes_on_or_was_killed_has_a_curve(runs: list[ScoredRun], tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "total": 2 / step}) + "\n" for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "tot')
    trained = replace(runs[0], made_by={"weights": str(tmp_path / "checkpoints" / "step_2")})
    assert "<svg" in training_curves([trained])


def test_runs_that_cannot_be_compared_are_refused(runs: list[ScoredRun], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no report.json: score it first"):
        read_runs([tmp_path])
    report = json.loads((runs[0].folder / "report.json").read_text())
    (runs[0].folder / "report.json").write_text(json.dumps({**report, "split": "train"}))
    with pytest.raises(ValueError, match=r"different splits cannot be compared: tiny/train, tiny/valid"):
        read_runs([run.folder for run in runs])


def test_the_page_is_of_the_split_that_was_scored(dataset: DatasetConfig, runs: list[ScoredRun]) -> None:
    with pytest.raises(ValueError, match=r"the runs are scored on tiny \(valid\), but dataset is other \(valid\)"):
        build_page(replace(dataset, name="other"), runs, memory_frames)
    file = Path(dataset.root) / "valid/meta_expressions.json"
    edit_json(file, lambda content: content["videos"].pop("b"))
    with pytest.raises(ValueError, match=r"tiny \(valid\) no longer has b/0: score the runs on what it is now"):
        build_page(dataset, runs, memory_frames)


def test_a_frame_without_truth_does_not_stop_the_page(tmp_path: Path) -> None:
    written = WRITERS[Layout.reason_vos](tmp_path / "data", "valid")
    folder = write_png(tmp_path / "predictions", written.dataset, true_masks(written))
    (tmp_path / "data/Annotations/MOSE_reason0_1/00001.png").unlink()
    write_report(score_predictions(written.dataset, folder), folder)
    assert "data:video/mp4" in build_page(written.dataset, read_runs([folder]), memory_frames, num_sentences=1)
    first = read_expressions(written.dataset)[0]
    read = open_sources(open_masks(written.dataset), {}, [first])
    assert read(first, [0, 1], SIZE)["ground truth"].any((1, 2)).tolist() == [True, False]


def test_the_page_holds_everything_and_needs_no_network(dataset: DatasetConfig, runs: list[ScoredRun]) -> None:
    page = build_page(dataset, runs, memory_frames, num_sentences=1)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    changed = next(name for name in runs[0].scores if name.startswith("b/"))
    assert f"{runs[0].scores[changed].jf:.1f}" in text
    assert "most changed" in text
    assert "inference.memory_stride 1 3" in text
    assert "llm 50.0 50.0" in text
    # Frame 00005 of a/one, the second: its prompt shows both, it reads the memory of the first.
    assert "00005 00000, 00005 00000 0.750" in text
    assert page.count("data:video/mp4;base64,") == page.count("data:image/jpeg;base64,") >= 1
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<svg" in page
    key_frames = {**runs[1].made_by, "identity": {**runs[1].made_by["identity"], "key_frames": "a hash"}}
    started = ScoredRun("k", runs[1].folder, runs[1].scores, runs[1].report, key_frames, runs[1].cost)
    assert "counted from its key frame" in build_page(dataset, [started], memory_frames, num_sentences=1)
