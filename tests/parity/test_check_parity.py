"""tools/check_parity.py on whole folders: any sizes pass, anything broken is named and fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.edits import edit_arrays, edit_json
from tests.parity.recorder import HEIGHT, WIDTH, cases
from tools.check_parity import RECORDED_PARTS, main
from tools.parity.comparison import Row, is_met, unpack
from tools.parity.network import read_fixture
from tools.parity.replay_inference import TOGETHER, replay_inference, replay_metrics, replay_preprocess

Content = dict[str, Any]


def check(folder: Path) -> tuple[object, list[Content]]:
    """Exit status and rows of the tool."""
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), "--json", str(folder.parent / "report.json")])
    return stopped.value.code, json.loads((folder.parent / "report.json").read_text())["rows"]


def problems(folder: Path) -> dict[tuple[str, str], str]:
    """(case, quantity) -> status of what did not pass, training left aside."""
    fixture, rows = read_fixture(folder), list[Row]()
    replay_preprocess(rows, fixture)
    replay_inference(rows, fixture)
    replay_metrics(rows, fixture)
    assert not is_met(rows)
    return {(row.case, row.quantity): row.status for row in rows if row.status in ("fail", "error")}


@pytest.fixture
def small(folder: Path) -> Path:
    """The plain case alone, no probes, no training: replayed in half a second."""
    shutil.rmtree(folder / "training")
    for case in cases()[1:]:
        (folder / "inference" / f"{case.name}.npz").unlink()
    (folder / "inference" / "probes.npz").unlink()
    edit_json(folder / "inference" / "cases.json", lambda entries: entries.__delitem__(slice(1, None)))
    return folder


CASE = cases()[0].name


def test_a_whole_folder_of_other_sizes_is_met(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(recorded), "--json", str(tmp_path / "report.json")])
    content = json.loads((tmp_path / "report.json").read_text())
    assert stopped.value.code == 0
    assert content["met"]
    assert content["counts"] == {"pass": len(content["rows"]), "fail": 0, "error": 0, "absent": 0}
    named = {row["case"] for row in content["rows"]}
    training = {"training batch", "training step", "training step_contrastive"}
    detach = {"training, detach: true", "training, detach: false"}
    pictures = {f"preprocess {number}" for number in range(3)}
    passes = {case.name for case in cases()} | {f"probes of {CASE}"}
    assert named == {"checkpoint", "metrics", *training, *detach, *pictures, *passes}
    printed = capsys.readouterr().out
    for row in content["rows"]:
        assert row["case"] in printed
        assert row["quantity"].split()[0] in printed
    assert f"recorded: met ({len(content['rows'])} pass, 0 FAIL, 0 ERROR, 0 absent)" in printed


def test_missing_parts_are_told_and_are_no_failure(small: Path) -> None:
    shutil.rmtree(small / "metrics")
    (small / "sam2.pt").unlink()
    edit_json(small / "fixture.json", lambda settings: settings["sam2"].pop("weights"))
    code, rows = check(small)
    absent = {(row["case"], row["quantity"]) for row in rows if row["status"] == "absent"}
    assert code == 0
    assert absent == {
        ("checkpoint", "SAM2's own file"),
        (f"probes of {CASE}", "all probes"),
        ("training", "all steps"),
        ("metrics", "J, F"),
    }


def test_a_folder_with_nothing_to_compare_fails(small: Path) -> None:
    for part in RECORDED_PARTS:
        shutil.rmtree(small / part, ignore_errors=True)
    with pytest.raises(SystemExit, match="nothing to compare"):
        main([str(small)])


def embedding(folder: Path) -> None:
    edit_arrays(folder / "inference" / f"{CASE}.npz", lambda a: a["seg_embedding"].__iadd__(1e-2))


def memories(folder: Path) -> None:
    edit_arrays(folder / "inference" / f"{CASE}.npz", lambda a: a["num_memories"].__setitem__(3, 3))


def pixel(folder: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        masks = unpack(arrays["masks"], WIDTH, "masks")
        step, y, x = np.argwhere(~unpack(arrays["near_threshold"], WIDTH, "near"))[-1]
        masks[step, y, x] ^= True
        arrays["masks"] = np.packbits(masks, axis=-1)

    edit_arrays(folder / "inference" / f"{CASE}.npz", change)


def clip_input(folder: Path) -> None:
    edit_arrays(folder / "preprocess" / "inputs.npz", lambda a: a["clip_1"].__setitem__((0, 0, 0), 9.0))


def sam2_input(folder: Path) -> None:
    edit_arrays(folder / "preprocess" / "inputs.npz", lambda a: a["sam2_sub16_2"].__iadd__(2e-5))


def region(folder: Path) -> None:
    edit_json(folder / "metrics" / "metrics.json", lambda e: e[0].update(J=float(np.nextafter(e[0]["J"], 1))))


def boundary(folder: Path) -> None:
    edit_json(folder / "metrics" / "metrics.json", lambda e: e[0].update(F=float(np.nextafter(e[0]["F"], 1))))


def stride(folder: Path) -> None:
    edit_json(folder / "inference" / "cases.json", lambda e: e[0].update(memory_stride=1))


def sam2_weights(folder: Path) -> None:
    import torch

    content = torch.load(folder / "sam2.pt", weights_only=True)
    content["model"]["no_mem_embed"] += 1
    torch.save(content, folder / "sam2.pt")


@pytest.mark.parametrize(
    ("damage", "case", "quantity"),
    [
        (embedding, CASE, "[SEG] embedding"),
        (memories, CASE, "memory frames read"),
        (clip_input, "preprocess 1", "input of CLIP"),
        (sam2_input, "preprocess 2", "input of SAM2"),
        (region, "metrics", "J"),
        (boundary, "metrics", "F"),
    ],
)
def test_a_number_that_differs_fails_its_row_alone(
    small: Path, damage: Callable[[Path], None], case: str, quantity: str
) -> None:
    damage(small)
    assert problems(small) == {(case, quantity): "fail"}


def test_a_pixel_that_differs_fails_both_rows_of_masks(small: Path) -> None:
    pixel(small)
    rows = ("masks outside near_threshold", f"{TOGETHER} outside near_threshold")
    assert problems(small) == {(CASE, row): "fail" for row in rows}


def test_another_memory_stride_shows(small: Path) -> None:
    stride(small)
    assert problems(small)[CASE, "memory frames read"] == "fail"


@pytest.mark.parametrize(
    ("damage", "case", "quantity"),
    [
        (embedding, CASE, "[SEG] embedding"),
        (memories, CASE, "memory frames read"),
        (sam2_weights, "checkpoint", "SAM2's own file"),
    ],
)
def test_the_tool_fails_and_names_the_row(
    small: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], None], case: str, quantity: str
) -> None:
    damage(small)
    code, rows = check(small)
    assert code == 1
    assert [(row["case"], row["quantity"]) for row in rows if row["status"] == "fail"] == [(case, quantity)]
    printed = capsys.readouterr().out
    assert any(quantity in line and "FAIL" in line for line in printed.splitlines())
    assert "NOT MET" in printed


def stray(folder: Path) -> None:
    shutil.copy(folder / "inference" / f"{CASE}.npz", folder / "inference" / "stray.npz")


def other_frame_size(folder: Path) -> None:
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "frames" / "00002.png")


def case_entry(change: Callable[[Content], object]) -> Callable[[Path], None]:
    """Change what cases.json says of the case."""
    return lambda folder: edit_json(folder / "inference" / "cases.json", lambda entries: change(entries[0]))


def twice(folder: Path) -> None:
    edit_json(folder / "inference" / "cases.json", lambda entries: entries.append(entries[0]))


@pytest.mark.parametrize(
    ("damage", "case", "quantity"),
    [
        (lambda f: (f / "inference" / f"{CASE}.npz").unlink(), CASE, "case"),
        (lambda f: (f / "inference" / f"{CASE}.npz").write_bytes(b"PK"), CASE, "case"),
        (lambda f: (f / "inference" / "cases.json").unlink(), "inference", "cases.json"),
        (lambda f: (f / "inference" / "cases.json").write_text("[]"), "inference", "cases.json"),
        (twice, "inference", "cases.json"),
        (stray, "stray", "case"),
        (lambda f: (f / "frames" / "00003.png").unlink(), "inference", "cases.json"),
        (other_frame_size, "inference", "cases.json"),
        (case_entry(lambda e: e.pop("expression")), CASE, "case"),
        (case_entry(lambda e: e.update(fuser_gamma="x")), CASE, "case"),
        (case_entry(lambda e: e.update(memory_stride=None)), CASE, "case"),
        (case_entry(lambda e: e.update(num_frames=3)), CASE, "case"),
        (case_entry(lambda e: e.update(lm_head_seg_row="no.npy")), CASE, "case"),
        (lambda f: (f / "preprocess" / "1.png").unlink(), "preprocess 1", "picture"),
        (lambda f: (f / "preprocess" / "inputs.npz").unlink(), "preprocess", "inputs.npz"),
        (lambda f: (f / "metrics" / "masks.npz").unlink(), "metrics", "metrics.json"),
        (lambda f: edit_json(f / "metrics" / "metrics.json", lambda e: e.pop()), "metrics", "gt_01"),
    ],
)
def test_what_cannot_be_compared_fails_and_is_named(
    small: Path, damage: Callable[[Path], object], case: str, quantity: str
) -> None:
    damage(small)
    assert problems(small)[case, quantity] == "error"


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (f"inference/{CASE}.npz", CASE),
        ("sam2.pt", "checkpoint"),
        ("checkpoint/clip/config.json", CASE),
        ("checkpoint/added_tokens.json", "checkpoint"),
    ],
)
def test_the_tool_fails_where_a_file_is_missing(small: Path, name: str, case: str) -> None:
    (small / name).unlink()
    code, rows = check(small)
    assert code == 1
    (*_, row) = [row for row in rows if row["case"] == case and row["status"] == "error"]
    assert Path(name).name in row["note"] or Path(name).parent.name in row["note"]


def test_the_tool_replays_what_is_left_of_training(folder: Path) -> None:
    """A step without its JSON cannot be compared; one that breaks leaves the others."""
    for part in ("inference", "preprocess", "metrics"):
        shutil.rmtree(folder / part)
    (folder / "training" / "step_contrastive_queue.npz").unlink()
    (folder / "training" / "step.json").rename(folder / "training" / "step_b.json")
    code, rows = check(folder)
    assert code == 1
    assert [(row["case"], row["quantity"]) for row in rows if row["status"] in ("fail", "error")] == [
        ("training step", "step"),
        ("training step_gradients", "step"),
        ("training step_contrastive", "step"),
    ]
    assert any(row["case"] == "training step_b" and row["status"] == "pass" for row in rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "fixture.json").unlink(), "has no fixture.json"),
        (lambda f: (f / "fixture.json").write_text("{"), "fixture.json is no JSON"),
        (lambda f: edit_json(f / "fixture.json", lambda s: s.pop("num_query")), "no 'num_query'"),
        (lambda f: edit_json(f / "fixture.json", lambda s: s.update(height="37")), "'height' is '37'; expected int"),
        (lambda f: edit_json(f / "fixture.json", lambda s: s.update(height=True)), "'height' is True; expected int"),
        (lambda f: edit_json(f / "fixture.json", lambda s: s.update(dtype="bfloat16")), "bfloat16; the gates hold"),
        (lambda f: (f / "sam2.json").unlink(), "has no sam2.json"),
    ],
)
def test_a_folder_that_is_none_stops_with_one_message(
    small: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(small)
    with pytest.raises(SystemExit, match=message):
        main([str(small)])
