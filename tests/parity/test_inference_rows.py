"""Each recorded array of a pass has a row, and that row fails when the array is another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from glus.config import FuserGamma
from glus.models.pretrained import LoadedModel
from tests.parity.conftest import not_passed
from tools.parity.fixture import Arrays, Fixture, Record, read_fixture, read_records, unpack
from tools.parity.inference import CASES_FILE, EXACT, FLOATS, compare_case, open_frames, run_case
from tools.parity.models import Models
from tools.parity.probes import replay_probes
from tools.parity.report import Report, Row, Status
from tools.parity.watch import Step

Change = Callable[[dict[str, np.ndarray]], object]
PLAIN, FAILING = "bank_stride2_exp0", "some_fail_exp0"


class Replayed(NamedTuple):
    """A pass of the tiny folder."""

    fixture: Fixture
    model: LoadedModel
    entry: Record
    arrays: dict[str, np.ndarray]
    steps: list[Step]


@pytest.fixture(scope="module")
def passes(recorded: Path) -> dict[str, Replayed]:
    """Two passes, replayed once."""
    fixture = read_fixture(recorded)
    model, video = Models(fixture).frozen(FuserGamma.identity), open_frames(fixture)
    found = {}
    for entry in read_records(recorded / "inference" / CASES_FILE):
        name = entry.get("case", str)
        if name in (PLAIN, FAILING):
            path = recorded / "inference" / f"{name}.npz"
            steps = run_case(fixture, model, video, entry, Arrays(path), keep=2)
            found[name] = Replayed(fixture, model, entry, dict(np.load(path)), steps)
    return found


def rows(replayed: Replayed, folder: Path, change: Change, entry: Record | None = None) -> dict[str, Row]:
    """Rows of a pass against arrays that were changed."""
    arrays = {name: value.copy() for name, value in replayed.arrays.items()}
    change(arrays)
    np.savez(folder / "case.npz", **arrays)
    report = Report(folder)
    compare_case(
        report.case("case"),
        replayed.fixture,
        replayed.model,
        entry or replayed.entry,
        Arrays(folder / "case.npz"),
        replayed.steps,
    )
    return {row.quantity: row for row in report.rows}


def add(name: str, where: object, amount: float) -> Change:
    """Another value."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][where] = arrays[name][where] + amount

    return change


def flip(near: bool) -> Change:
    """The prediction of one pixel, near the threshold or not."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        masks, where = (unpack(arrays[name], WIDTH, name) for name in ("masks", "near_threshold"))
        step, y, x = np.argwhere(where == near)[0]
        masks[step, y, x] ^= True
        arrays["masks"] = np.packbits(masks, axis=-1)

    return change


WIDTH = 50


def test_as_recorded_everything_passes(passes, tmp_path):
    for name in (PLAIN, FAILING):
        found = rows(passes[name], tmp_path, lambda arrays: None)
        assert not not_passed(found)
        assert len(found) == len(FLOATS) + len(EXACT) + 4


def test_every_step_counts_that_was_answered(passes, tmp_path):
    failing = passes[FAILING]
    failed = failing.entry.get("failed_steps", list)
    assert 0 < len(failed) < len(failing.steps), "the recording is of no use"
    found = rows(failing, tmp_path, lambda arrays: None)
    answered = len(failing.steps) - len(failed)
    assert found["stability score"].compared == answered
    assert found["next token"].compared == len(failing.steps)


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (add("seg_embedding", (3, 0), 0.01), "[SEG] embedding"),
        (add("low_res_logits", (5, 3, 3), 0.1), "low-resolution logits"),
        (add("low_res_range", (1, 0), -0.1), "range of the logits"),
        (add("stability", 4, 2e-3), "stability score"),
        (add("predicted_iou", (0, 3), 1e-4), "predicted IoU"),
        (add("num_memories", 2, -1), "memory frames read"),
        (lambda arrays: arrays["used_multimask"].__ixor__(True), "stability fallback"),
        (add("input_ids", 7, 1), "prompt ids"),
        (add("context_index", 1, -1), "context frames"),
        (flip(near=False), "masks outside near_threshold"),
    ],
)
def test_a_changed_value_fails_its_row_alone(passes, tmp_path, change, quantity):
    assert not_passed(rows(passes[PLAIN], tmp_path, change)) == {quantity: Status.failed}


def test_another_next_token_fails(passes, tmp_path):
    """The arrays of a step that is said to have failed are not looked at."""
    found = rows(passes[PLAIN], tmp_path, add("next_token", 1, -1))
    assert not_passed(found) == {"next token": Status.failed}
    assert found["stability score"].compared == len(passes[PLAIN].steps) - 1


def test_seg_where_the_replay_has_none_cannot_be_compared(passes, tmp_path):
    failed = passes[FAILING].entry.get("failed_steps", list)[0]
    seg = passes[FAILING].model.vocabulary.seg_id

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["next_token"][failed] = seg

    found = not_passed(rows(passes[FAILING], tmp_path, change))
    assert found == {"next token": Status.failed} | {q.title: Status.error for q in FLOATS.values()}


def test_near_pixels_and_padding_may_differ(passes, tmp_path):
    def pad(arrays: dict[str, np.ndarray]) -> None:
        arrays["masks"][..., -1] ^= 1  # width 50: the last byte of a row holds two pixels

    assert not not_passed(rows(passes[PLAIN], tmp_path, flip(near=True)))
    assert not not_passed(rows(passes[PLAIN], tmp_path, pad))


def test_a_longer_prompt_counts_whole(passes, tmp_path):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["input_ids"] = np.insert(arrays["input_ids"], 3, 5)
        arrays["input_offsets"][1:] += 1

    found = rows(passes[PLAIN], tmp_path, change)
    assert not_passed(found) == {"prompt ids": Status.failed}
    assert "step 0: replay has" in found["prompt ids"].note


@pytest.mark.parametrize("name", [*FLOATS, *EXACT, "context_index", "input_ids", "masks"])
def test_a_missing_array_is_told(passes, tmp_path, name):
    found = not_passed(rows(passes[PLAIN], tmp_path, lambda arrays: arrays.pop(name)))
    if name == "next_token":  # without it nobody knows which steps were answered
        assert set(found.values()) == {Status.absent, Status.error}
    else:
        assert list(found.values()) == [Status.absent]


@pytest.mark.parametrize("name", ["near_threshold", "input_offsets"])
def test_what_another_array_needs_is_an_error(passes, tmp_path, name):
    assert list(not_passed(rows(passes[PLAIN], tmp_path, lambda arrays: arrays.pop(name))).values()) == [Status.error]


@pytest.mark.parametrize("name", [*FLOATS, *(name for name in EXACT if name != "next_token"), "masks"])
def test_another_number_of_frames_is_an_error(passes, tmp_path, name):
    def cut(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name][:-1]

    assert list(not_passed(rows(passes[PLAIN], tmp_path, cut)).values()) == [Status.error]


def test_values_that_are_not_numbers_are_an_error(passes, tmp_path):
    found = not_passed(rows(passes[PLAIN], tmp_path, add("seg_embedding", (0, 0), np.nan)))
    assert found == {"[SEG] embedding": Status.error}


def test_an_unknown_array_is_an_error(passes, tmp_path):
    found = rows(passes[PLAIN], tmp_path, lambda arrays: arrays.update(object_score=np.zeros(6)))
    assert not_passed(found) == {"object_score": Status.error}


def test_failed_steps_are_compared(passes, tmp_path):
    for steps, status in (([0], Status.failed), (None, Status.absent)):
        entry = Record({**passes[PLAIN].entry.values, "failed_steps": steps}, "entry")
        found = rows(passes[PLAIN], tmp_path, lambda arrays: None, entry)
        assert not_passed(found) == {"steps without [SEG]": status}


PROBES = (
    *("clip_pixel_values", "visual_tokens", "llm_state", "sam2_input_sub16", "high_res_256_sub4", "high_res_128_sub2"),
    *("image_feature_64_sub2", "position_64_sub2", "dense_position_64_sub2", "conditioned_64_sub2"),
    *("all_mask_logits_sub4", "all_predicted_iou", "memory_features", "memory_position"),
)


def probe_rows(replayed: Replayed, recorded: Path, folder: Path, change: Change) -> dict[str, Row]:
    """Rows of probes that were changed."""
    arrays = dict(np.load(recorded / "inference" / "probes.npz"))
    change(arrays)
    np.savez(folder / "probes.npz", **arrays)
    report = Report(folder)
    video, case = open_frames(replayed.fixture), Arrays(recorded / "inference" / f"{PLAIN}.npz")
    probes = Arrays(folder / "probes.npz")
    replay_probes(report.case("probes"), probes, replayed.model.glus, video, case, replayed.steps)
    return {row.quantity: row for row in report.rows}


@pytest.mark.parametrize("name", PROBES)
def test_each_probe_has_a_row_that_can_fail(passes, recorded, tmp_path, name):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].flat[-1] += 1e-4 * np.abs(arrays[name]).max()

    found = probe_rows(passes[PLAIN], recorded, tmp_path, change)
    assert set(found) == set(PROBES)
    assert not_passed(found) == {name: Status.failed}


def test_missing_and_unknown_probes_are_told(passes, recorded, tmp_path):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["mystery"] = arrays.pop("llm_state")
        arrays["conditioned_64_sub2"] = arrays["conditioned_64_sub2"].repeat(2, axis=0)  # of steps that were not kept

    found = not_passed(probe_rows(passes[PLAIN], recorded, tmp_path, change))
    assert found == {"mystery": Status.error, "llm_state": Status.absent, "conditioned_64_sub2": Status.error}
