"""Whatever is wrong with predictions is found, named, and costs exactly what it spoils."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import Layout, Missing
from glus.data.predictions import open_predictions, read_answers
from glus.evaluation.packed import read_complete
from glus.evaluation.score import read_scored_videos, score_predictions
from tests.evaluation.predicted import true_masks, write_png, write_rle
from tests.layouts import WRITERS, Written

Damage = Callable[[Path], None]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """MeViS valid_u: two videos of five frames with two sentences each."""
    return WRITERS[Layout.mevis](tmp_path / "mevis", "valid_u")


def change_lines(change: Callable[[list[str]], None]) -> Damage:
    """A change of the lines of the first video's run-length codes: sentence 1, then 0, five frames each."""

    def damage(folder: Path) -> None:
        path = folder / "valid_u0.jsonl"
        lines = path.read_text().splitlines()
        change(lines)
        path.write_text("\n".join(lines) + "\n")

    return damage


def change_entry(number: int, **changes: object) -> Damage:
    """A change of the fields of one line."""

    def change(lines: list[str]) -> None:
        lines[number] = json.dumps({**json.loads(lines[number]), **changes})

    return change_lines(change)


def cut_line(lines: list[str]) -> None:
    lines[9] = lines[9][:30]


def repeat_line(lines: list[str]) -> None:
    lines.append(lines[7])


def repeat_key(lines: list[str]) -> None:
    lines[7] = lines[7].replace('"masks": {', '"masks": {"0": "01", ')


def cut_file(folder: Path) -> None:
    path = folder / "valid_u0.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b'"frame"')])


def damage_png(name: str, content: bytes | np.ndarray | None) -> Damage:
    """Replaces or deletes a mask."""

    def damage(folder: Path) -> None:
        path = folder / "valid_u0/0" / name
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.fromarray(content).save(path)

    return damage


def cut_png(folder: Path) -> None:
    path = folder / "valid_u0/0/00002.png"
    path.write_bytes(path.read_bytes()[:-30])


def no_expression(folder: Path) -> None:
    shutil.rmtree(folder / "valid_u0/0")


def no_video(folder: Path) -> None:
    shutil.rmtree(folder / "valid_u0")


NAME = "mevis/valid_u0/0"
DAMAGES: list[tuple[str, Damage, str, float]] = [
    ("png", no_video, f"{NAME}: no folder .*valid_u0/0", 0.0),
    ("png", no_expression, f"{NAME}: no folder .*valid_u0/0", 0.0),
    ("png", damage_png("00002.png", None), f"{NAME}, frame 00002: .*00002.png is missing", 0.8),
    ("png", damage_png("00002.png", np.zeros((52, 36), np.uint8)), f"{NAME}, frame 00002: .* is 52x36, .* 36x52", 0.8),
    ("png", cut_png, f"{NAME}, frame 00002: .* is not a readable PNG", 0.8),
    ("png", damage_png("00002.png", b"GIF89a"), f"{NAME}, frame 00002: .* is not a readable PNG", 0.8),
    ("png", damage_png("00002.png", b""), f"{NAME}, frame 00002: .* is not a readable PNG", 0.8),
    ("rle", lambda folder: (folder / "valid_u0.jsonl").unlink(), f"{NAME}: no folder", 0.0),
    ("rle", change_lines(cut_line), r"jsonl, line 10: is not complete JSON", 0.8),
    ("rle", cut_file, r"jsonl, line 10: is not complete JSON", 0.8),
    ("rle", change_lines(lambda lines: lines.__delitem__(7)), f"{NAME}, frame 00002: .*jsonl has no mask of it", 0.8),
    ("rle", change_lines(lambda lines: lines.__delitem__(slice(5, 10))), f"{NAME}: .*jsonl has no mask of it", 0.0),
    ("rle", change_lines(repeat_line), f"{NAME}, frame 00002: .* more than once, in lines 8 and 11", 0.8),
    ("rle", change_lines(repeat_key), "jsonl, line 8: key '0' stands twice", 0.8),
    ("rle", change_entry(7, size=[52, 36]), f"{NAME}, frame 00002: .*line 8, is 52x36, .* 36x52", 0.8),
    ("rle", change_entry(7, masks={"0": "what?"}), f"{NAME}, frame 00002: .* does not decode", 0.8),
    ("rle", change_entry(7, masks={"0": "o01"}), f"{NAME}, frame 00002: .* does not decode: its runs cover", 0.8),
    ("rle", change_entry(7, masks=["0"]), r"jsonl, line 8: expected \{frame: name", 0.8),
    ("rle", change_entry(7, size=["36", "52"]), r"jsonl, line 8: expected \{frame: name", 0.8),
]


@pytest.mark.parametrize(("form", "damage", "message", "expected"), DAMAGES)
def test_every_damage_is_named(
    form: str, damage: Damage, message: str, expected: float, written: Written, tmp_path: Path
) -> None:
    write = write_png if form == "png" else write_rle
    folder = write(tmp_path / "predictions", written.dataset, true_masks(written))
    assert score_predictions(written.dataset, folder).mean_over_sentences.jf == 1
    damage(folder)
    report = score_predictions(written.dataset, folder)
    assert report.expressions[0].j == report.expressions[0].f == pytest.approx(expected)
    assert re.search(message, "\n".join(report.problems)), report.problems
    with pytest.raises(ValueError, match=r"missing=error"):
        score_predictions(written.dataset, folder, Missing.error)
    dropped = score_predictions(written.dataset, folder, Missing.drop)
    assert (dropped.mean_over_sentences.jf, dropped.problems) == (1, report.problems)
    assert dropped.expressions[0].is_counted is False


def test_what_belongs_to_nothing_is_listed(written: Written, tmp_path: Path) -> None:
    folder = write_rle(tmp_path / "predictions", written.dataset, true_masks(written))
    change_entry(7, masks={"0": json.loads(line_of(folder, 7))["masks"]["0"], "9": "xy"})(folder)
    change_lines(lambda lines: lines.append(lines[0].replace('"00000"', '"77777"')))(folder)
    shutil.copy(folder / "valid_u0.jsonl", folder / "other.jsonl")
    report = score_predictions(written.dataset, folder)
    assert (report.mean_over_sentences.jf, report.problems) == (1, ())
    assert report.warnings == (
        f"{folder}/valid_u0.jsonl: masks of no expression '9'",
        f"{folder}/valid_u0.jsonl: 1 masks of expression '1' in no frame, the first '77777'",
        f"{folder}/other.jsonl: masks of no video",
    )


def line_of(folder: Path, number: int) -> str:
    return (folder / "valid_u0.jsonl").read_text().splitlines()[number]


def test_both_forms_at_once_are_refused(written: Written, tmp_path: Path) -> None:
    folder = write_rle(tmp_path / "predictions", written.dataset, true_masks(written))
    write_png(folder, written.dataset, true_masks(written))
    with pytest.raises(ValueError, match=r"mevis/valid_u0/0 is predicted twice: .*valid_u0\.jsonl and .*valid_u0/0"):
        score_predictions(written.dataset, folder)


def test_a_frame_may_come_in_several_lines_and_in_one(written: Written, tmp_path: Path) -> None:
    folder = write_rle(tmp_path / "predictions", written.dataset, true_masks(written))
    path = folder / "valid_u0.jsonl"
    frames: dict[str, dict] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        frames.setdefault(entry["frame"], {**entry, "masks": {}})["masks"].update(entry["masks"])
    path.write_text("\n".join(json.dumps(entry) for entry in frames.values()))  # no line feed at the end either
    report = score_predictions(written.dataset, folder)
    assert (report.mean_over_sentences.jf, report.problems) == (1, ())


def test_answers_of_a_damaged_file_are_an_error_that_names_it(written: Written, tmp_path: Path) -> None:
    folder = write_rle(tmp_path / "predictions", written.dataset, true_masks(written))
    first = read_scored_videos(written.dataset)[0][0]
    assert len(read_answers(folder, first)) == 5
    change_lines(cut_line)(folder)
    with pytest.raises(ValueError, match=r"valid_u0\.jsonl is damaged: "):
        read_answers(folder, first)


def test_read_complete(written: Written, tmp_path: Path) -> None:
    folder = write_png(tmp_path / "predictions", written.dataset, true_masks(written))
    video = read_scored_videos(written.dataset)[0]
    truth = written.truth[video[0].video, video[0].exp_id].masks_THW
    masks = read_complete(open_predictions(folder, video), video[0], [1, 3], truth.shape[1:])
    assert (masks.to_dense() == truth[[1, 3]]).all()
    (folder / "valid_u0/0/00003.png").unlink()
    with pytest.raises(ValueError, match=r"frame 00003: .* is missing .*needs complete predictions: see score\.py"):
        read_complete(open_predictions(folder, video), video[0], [1, 3], truth.shape[1:])
