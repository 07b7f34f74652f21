"""Each recorded array of a pass has a row, and that row fails when the array is another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from glus.models.pretrained import LoadedModel
from tests.parity.conftest import not_passed
from tools.parity.comparison import Case, Record, Row, read_arrays, read_records, unpack
from tools.parity.network import Fixture, read_fixture, watch
from tools.parity.replay_inference import (
    CASES_FILE,
    EXACT_ARRAYS,
    FLOAT_ARRAYS,
    compare_case,
    compare_probes,
    load_case,
    open_frames,
)

Change = Callable[[dict[str, np.ndarray]], object]
PLAIN, FAILING = "bank_stride2_exp0", "some_fail_exp0"


class Replayed(NamedTuple):
    """A pass of the tiny folder."""

    fixture: Fixture
    model: LoadedModel
    entry: Record
    arrays: Record
    steps: list[Record]


@pytest.fixture(scope="module")
def passes(recorded: Path) -> dict[str, Replayed]:
    """Two passes, replayed once."""
    fixture = read_fixture(recorded)
    video, found = open_frames(fixture), {}
    for entry in read_records(recorded / "inference" / CASES_FILE):
        if entry["case"] in (PLAIN, FAILING):
            arrays = read_arrays(recorded / "inference" / f"{entry['case']}.npz")
            model, predictor = load_case(fixture, entry, arrays)
            steps = list(watch(predictor, video, entry["expression"], arrays["frame_index"].tolist(), is_probed=True))
            found[entry["case"]] = Replayed(fixture, model, entry, arrays, steps)
    return found


def rows(replayed: Replayed, change: Change, entry: Record | None = None) -> dict[str, Row]:
    """Rows of a pass against arrays that were changed."""
    arrays = Record({name: value.copy() for name, value in replayed.arrays.items()}, "changed.npz")
    change(arrays)
    case = Case([], "case")
    compare_case(case, replayed.fixture, replayed.model, entry or replayed.entry, arrays, replayed.steps)
    return {row.quantity: row for row in case.rows}


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


def test_as_recorded_everything_passes(passes):
    for name in (PLAIN, FAILING):
        found = rows(passes[name], lambda arrays: None)
        assert not not_passed(found)
        assert len(found) == len(FLOAT_ARRAYS) + len(EXACT_ARRAYS) + 4


def test_every_step_counts_that_was_answered(passes):
    failing = passes[FAILING]
    failed = failing.entry["failed_steps"]
    assert 0 < len(failed) < len(failing.steps), "the recording is of no use"
    found = rows(failing, lambda arrays: None)
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
def test_a_changed_value_fails_its_row_alone(passes, change, quantity):
    assert not_passed(rows(passes[PLAIN], change)) == {quantity: "fail"}


def test_another_next_token_fails(passes):
    """The arrays of a step that is said to have failed are not looked at."""
    found = rows(passes[PLAIN], add("next_token", 1, -1))
    assert not_passed(found) == {"next token": "fail"}
    assert found["stability score"].compared == len(passes[PLAIN].steps) - 1


def test_seg_where_the_replay_has_none_cannot_be_compared(passes):
    failed = passes[FAILING].entry["failed_steps"][0]
    seg = passes[FAILING].model.vocabulary.seg_id

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["next_token"][failed] = seg

    found = not_passed(rows(passes[FAILING], change))
    assert found == {"next token": "fail"} | {title: "error" for title, *_ in FLOAT_ARRAYS.values()}


def test_near_pixels_and_padding_may_differ(passes):
    def pad(arrays: dict[str, np.ndarray]) -> None:
        arrays["masks"][..., -1] ^= 1  # width 50: the last byte of a row holds two pixels

    assert not not_passed(rows(passes[PLAIN], flip(near=True)))
    assert not not_passed(rows(passes[PLAIN], pad))


def test_a_longer_prompt_counts_whole(passes):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["input_ids"] = np.insert(arrays["input_ids"], 3, 5)
        arrays["input_offsets"][1:] += 1

    found = rows(passes[PLAIN], change)
    assert not_passed(found) == {"prompt ids": "fail"}
    assert "step 0: replay has" in found["prompt ids"].note


@pytest.mark.parametrize("name", [*FLOAT_ARRAYS, *EXACT_ARRAYS, "context_index", "input_ids", "masks"])
def test_a_missing_array_is_told(passes, name):
    found = not_passed(rows(passes[PLAIN], lambda arrays: arrays.pop(name)))
    if name == "next_token":  # without it nobody knows which steps were answered
        assert set(found.values()) == {"absent", "error"}
    else:
        assert list(found.values()) == ["absent"]


@pytest.mark.parametrize("name", ["near_threshold", "input_offsets"])
def test_what_another_array_needs_is_an_error(passes, name):
    assert list(not_passed(rows(passes[PLAIN], lambda arrays: arrays.pop(name))).values()) == ["error"]


@pytest.mark.parametrize("name", [*FLOAT_ARRAYS, *(name for name in EXACT_ARRAYS if name != "next_token"), "masks"])
def test_another_number_of_frames_is_an_error(passes, name):
    def cut(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name][:-1]

    assert list(not_passed(rows(passes[PLAIN], cut)).values()) == ["error"]


def test_values_that_are_not_numbers_are_an_error(passes):
    found = not_passed(rows(passes[PLAIN], add("seg_embedding", (0, 0), np.nan)))
    assert found == {"[SEG] embedding": "error"}


def test_an_unknown_array_is_an_error(passes):
    found = rows(passes[PLAIN], lambda arrays: arrays.update(object_score=np.zeros(6)))
    assert not_passed(found) == {"object_score": "error"}


def test_failed_steps_are_compared(passes):
    for steps, status in (([0], "fail"), (None, "absent")):
        entry = Record({**passes[PLAIN].entry, "failed_steps": steps}, "entry")
        found = rows(passes[PLAIN], lambda arrays: None, entry)
        assert not_passed(found) == {"steps without [SEG]": status}


PROBES = (
    *("clip_pixel_values", "visual_tokens", "llm_state", "sam2_input_sub16", "high_res_256_sub4", "high_res_128_sub2"),
    *("image_feature_64_sub2", "position_64_sub2", "dense_position_64_sub2", "conditioned_64_sub2"),
    *("all_mask_logits_sub4", "all_predicted_iou", "memory_features", "memory_position"),
)


def probe_rows(replayed: Replayed, recorded: Path, change: Change) -> dict[str, Row]:
    """Rows of probes that were changed."""
    probes, case = read_arrays(recorded / "inference" / "probes.npz"), Case([], "probes")
    change(probes)
    compare_probes(case, probes, replayed.steps)
    return {row.quantity: row for row in case.rows}


@pytest.mark.parametrize("name", PROBES)
def test_each_probe_has_a_row_that_can_fail(passes, recorded, name):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].flat[-1] += 1e-4 * np.abs(arrays[name]).max()

    found = probe_rows(passes[PLAIN], recorded, change)
    assert set(found) == set(PROBES)
    assert not_passed(found) == {name: "fail"}


def test_missing_and_unknown_probes_are_told(passes, recorded):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["mystery"] = arrays.pop("llm_state")
        arrays["conditioned_64_sub2"] = arrays["conditioned_64_sub2"].repeat(4, axis=0)  # of more steps than there are

    found = not_passed(probe_rows(passes[PLAIN], recorded, change))
    assert found == {"mystery": "error", "llm_state": "absent", "conditioned_64_sub2": "error"}
