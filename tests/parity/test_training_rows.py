"""Each recorded quantity of a training step has a row, and that row fails when the recording is another one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glus.models.pretrained import LoadedModel
from tests.edits import edit_arrays, edit_json
from tests.parity.conftest import not_passed
from tools.benchmarks.plain import silence_dropout
from tools.parity.comparison import Case, Row
from tools.parity.network import load_trainable, read_fixture
from tools.parity.recorded_batch import Setup, compare_batch, key_name, parse_key, read_setup
from tools.parity.replay_training import replay_detach, replay_step, replay_training

Content = dict[str, Any]
PLAIN, CONTRASTIVE = "step", "step_contrastive"


@pytest.fixture(scope="module")
def setup(recorded: Path) -> Setup:
    """The recorded batch and a model in training mode."""
    folder = recorded / "training"
    return read_setup(folder, load_trainable(read_fixture(recorded), folder / "lora.pt", detach=True))


def step_rows(
    setup: Setup,
    tmp_path: Path,
    name: str,
    change: Callable[[Content], object] | None = None,
    arrays: tuple[str, Callable[[dict[str, np.ndarray]], object]] | None = None,
) -> dict[str, Row]:
    """Rows of a step whose JSON, or one of its files of arrays, was changed."""
    folder = shutil.copytree(setup.folder, tmp_path / "training")
    if change:
        edit_json(folder / f"{name}.json", change)
    if arrays:
        edit_arrays(folder / arrays[0], arrays[1])
    case = Case([], name)
    with case.row("step"):
        replay_step(case, replace(setup, folder=folder), name)
    return {row.quantity: row for row in case.rows}


@pytest.mark.parametrize(("name", "count"), [(PLAIN, 17), (CONTRASTIVE, 26)])
def test_as_recorded_everything_passes(setup, tmp_path, name, count):
    found = step_rows(setup, tmp_path, name)
    assert not not_passed(found)
    assert len(found) == count


def scale(*path: str, by: float = 1.1) -> Callable[[Content], None]:
    """Multiply a number of the JSON."""

    def change(content: Content) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] *= by

    return change


def first_norm(content: Content, by: float = 1.1) -> None:
    content["gradient_norm"]["model.mm_projector.weight"] *= by


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (scale("losses", "ce_loss", by=1 + 1e-4), "loss, ce_loss"),
        (scale("losses", "mask_bce_loss", by=1 + 1e-4), "loss, mask_bce_loss"),
        (scale("losses", "mask_dice_loss", by=1 + 1e-4), "loss, mask_dice_loss"),
        (scale("losses", "mask_loss", by=1 + 1e-4), "loss, mask_loss"),
        (scale("losses", "loss", by=1 + 1e-4), "loss, loss"),
        (scale("gradient_norm_total", by=1.002), "gradient norm, total"),
        (scale("gradient_norm_by_group", "lora_A", by=1.01), "gradient norm, lora_A"),
        (first_norm, "gradient norm, worst tensor"),
        (lambda content: content["trainable_without_gradient"].pop(), "tensors without gradient"),
        (lambda content: content["gradient_norm"].pop("lm_head.weight"), "tensors with gradient"),
        (lambda content: content["gradient_norm"].update(mystery=0.0), "tensors with gradient"),
    ],
)
def test_a_changed_number_fails_its_row_alone(setup, tmp_path, change, quantity):
    assert not_passed(step_rows(setup, tmp_path, PLAIN, change)) == {quantity: "fail"}


def test_negligible_norms_are_compared_to_the_total(setup, tmp_path):
    name = "model.visual_model.sam_mask_decoder.output_hypernetworks_mlps.1.layers.0.weight"  # exactly zero

    def change(content: Content) -> None:
        assert content["gradient_norm"][name] == 0
        content["gradient_norm"][name] = share * content["gradient_norm_total"]

    share = 5e-7
    assert not not_passed(step_rows(setup, tmp_path / "a", PLAIN, change))
    share = 1e-5
    assert not_passed(step_rows(setup, tmp_path / "b", PLAIN, change)) == {"gradient norm, worst tensor": "fail"}


def test_a_negligible_norm_of_ours_must_be_negligible(setup, tmp_path):
    def change(content: Content) -> None:
        content["gradient_norm"]["model.mm_projector.weight"] = 0.0

    found = not_passed(step_rows(setup, tmp_path, PLAIN, change))
    assert found == {"gradient norm, worst negligible tensor (of the total)": "fail"}


def test_a_null_loss_must_be_none_of_ours(setup, tmp_path):
    found = step_rows(setup, tmp_path, PLAIN, lambda content: content["losses"].update(ce_loss=None, mystery=1.0))
    assert not_passed(found) == {"loss, ce_loss": "fail", "loss, mystery": "error"}


def nudge(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    """Add a tenth of the largest value to one."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].flat[-1] += 0.1 * np.abs(arrays[name]).max()

    return change


@pytest.mark.parametrize(
    ("file", "array", "quantity"),
    [
        ("step.npz", "seg_embedding", "[SEG] embedding"),
        ("step.npz", "low_res_logits", "low-resolution logits"),
        ("step_gradients.npz", "model.mm_projector.bias", "full gradients"),
    ],
)
def test_a_changed_array_fails_its_row_alone(setup, tmp_path, file, array, quantity):
    found = step_rows(setup, tmp_path, PLAIN, arrays=(file, nudge(array)))
    assert not_passed(found) == {quantity: "fail"}


def test_a_gradient_that_we_do_not_have_is_an_error(setup, tmp_path):
    change = ("step_gradients.npz", lambda arrays: arrays.update(mystery=np.zeros(3)))
    assert not_passed(step_rows(setup, tmp_path, PLAIN, arrays=change)) == {"full gradients": "error"}


@pytest.mark.parametrize(
    ("file", "quantities"),
    [("step.npz", {"[SEG] embedding", "low-resolution logits"}), ("step_gradients.npz", {"full gradients"})],
)
def test_missing_files_of_arrays_are_told(setup, tmp_path, file, quantities):
    smaller = replace(setup, folder=shutil.copytree(setup.folder, tmp_path / "smaller"))
    (smaller.folder / file).unlink()
    found = not_passed(step_rows(smaller, tmp_path, PLAIN))
    assert found == dict.fromkeys(quantities, "absent")


def a_draw(content: Content) -> Content:
    return next(draw for draw in content["draws"] if draw["loss"] is not None)


def swap_queue(content: Content) -> None:
    names = content["queue_after"]
    names[0], names[1] = names[1], names[0]


def own_negative(content: Content) -> None:
    draw = a_draw(content)
    draw["negatives"][0] = content["queue_after"].index(draw["anchor"])


def foreign_positive(content: Content) -> None:
    a_draw(content)["positive"] = content["queue_after"].index("mevis_x_y_4_00015")


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (lambda content: a_draw(content).update(loss=a_draw(content)["loss"] * 1.001), "contrastive terms"),
        (lambda content: a_draw(content).update(num_positive_candidates=7), "number of positive candidates"),
        (lambda content: content["draws"][0].update(anchor="mevis_b_1_00005"), "anchors"),
        (swap_queue, "queue, names in order"),
        (scale("losses", "contrastive_loss", by=1 + 1e-4), "loss, contrastive_loss"),
    ],
)
def test_a_changed_name_or_value_fails_its_row_alone(setup, tmp_path, change, quantity):
    assert not_passed(step_rows(setup, tmp_path, CONTRASTIVE, change)) == {quantity: "fail"}


@pytest.mark.parametrize(
    ("change", "quantity", "other"),
    [
        (own_negative, "drawn negatives are candidates", "drawn positives are candidates"),
        (foreign_positive, "drawn positives are candidates", "drawn negatives are candidates"),
    ],
)
def test_a_draw_from_elsewhere_fails_its_row(setup, tmp_path, change, quantity, other):
    """And the term, the loss and the gradients that follow from it."""
    found = not_passed(step_rows(setup, tmp_path, CONTRASTIVE, change))
    assert found[quantity] == found["contrastive terms"] == "fail"
    assert other not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: a_draw(content).update(loss=None), "other anchors have a term"),
        (lambda content: a_draw(content).update(positive=99), "out of range"),
        (lambda content: a_draw(content)["negatives"].pop(), "num_negatives"),
        (lambda content: content["queue_before"].append("mevis_other_3_00015"), "queue_before names 4"),
        (lambda content: content.update(queue_before=["mevis_b_9_00005", "a", "b"]), "entry 1: objects has no '9'"),
        (lambda content: content.pop("temperature"), "no 'temperature'"),
    ],
)
def test_draws_that_cannot_be_replayed_are_an_error(setup, tmp_path, change, message):
    found = step_rows(setup, tmp_path, CONTRASTIVE, change)
    assert found["step"].status == "error"
    assert message in found["step"].note


def test_queue_embeddings_are_compared(setup, tmp_path):
    change = ("step_contrastive_queue.npz", nudge("after"))
    assert not_passed(step_rows(setup, tmp_path, CONTRASTIVE, arrays=change)) == {"queue, embeddings": "fail"}


def test_keys_and_their_names(setup):
    for name in ("mevis_a_1_7_00005", "mevis_b_1_00005", "mevis_other_3_00010", "mevis_x_y_4_00015"):
        assert key_name(parse_key(name, setup.videos)) == name
    assert parse_key("mevis_a_1_7_00005", setup.videos).object_ids == {4}
    assert parse_key("mevis_other_3_00010", setup.videos).object_ids == frozenset()
    with pytest.raises(ValueError, match="dataset_video_expression_frame"):
        parse_key("mevis_3_00010", setup.videos)


def batch_rows(
    setup: Setup, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object] | None = None
) -> dict[str, str]:
    """What does not pass of a batch whose arrays were changed."""
    folder, case = shutil.copytree(setup.folder, tmp_path / "training", dirs_exist_ok=True), Case([], "batch")
    if change:
        edit_arrays(folder / "batch.npz", change)
    compare_batch(case, replace(setup, folder=folder))
    assert len(case.rows) == 3
    return not_passed({row.quantity: row for row in case.rows})


def move_label(arrays: dict[str, np.ndarray]) -> None:
    arrays["labels"] = np.roll(arrays["labels"], 1, axis=1)


def test_batch_rows(setup, tmp_path):
    assert not batch_rows(setup, tmp_path)
    ids = lambda arrays: arrays["input_ids"].__setitem__((0, 1), 5)  # noqa: E731
    assert batch_rows(setup, tmp_path, ids) == {"token ids": "fail"}
    assert batch_rows(setup, tmp_path, move_label) == {"labels at [SEG]": "fail"}
    assert batch_rows(setup, tmp_path, lambda arrays: arrays.pop("labels")) == {"labels at [SEG]": "error"}


def test_wording_of_another_template_is_told(setup):
    videos, case = copy.deepcopy(setup.videos), Case([], "batch")
    videos[1]["texts"] = ["another sentence"]
    compare_batch(case, replace(setup, videos=videos))
    assert [row.status for row in case.rows] == ["pass", "pass", "fail"]
    assert case.rows[2].absolute == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda videos: videos[0].pop("objects"), "no 'objects'"),
        (lambda videos: videos[0].update(conversations=["x", "y"]), "0 answers to 2 questions"),
        (lambda videos: videos[0].update(str_ids=["mevis_a_1_0", "other_a_1_2"]), "one dataset"),
        (lambda videos: videos[0].update(video="c"), "no 'c'"),
        (lambda videos: videos[1].update(expressions=["1", "2"]), "target masks of b are"),
        (lambda videos: videos[1].update(query_index=[1, 2, 3]), "target masks of b are"),
        (lambda videos: videos[1].update(context_index=[99]), "out of bounds"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_an_error(folder, change, message):
    edit_json(folder / "training" / "batch.json", change)
    rows: list[Row] = []
    replay_training(rows, read_fixture(folder))
    (row,) = rows
    assert (row.case, row.status) == ("training batch", "error")
    assert message in row.note


@pytest.mark.parametrize("name", ["lora.pt", "videos.npz", "batch.npz", "batch.json"])
def test_a_missing_file_of_the_batch_is_an_error(folder, name):
    (folder / "training" / name).unlink()
    rows: list[Row] = []
    replay_training(rows, read_fixture(folder))
    (row,) = rows
    assert (row.case, row.status) == ("training batch", "error")
    assert name in row.note


def test_adapters_must_be_those_of_the_model(folder):
    path = folder / "training" / "lora.pt"
    tensors = torch.load(path, weights_only=True)
    name = "model.layers.1.self_attn.v_proj.lora_B.default.weight"
    fixture = read_fixture(folder)
    torch.save({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=name):
        load_trainable(fixture, path, detach=True)
    torch.save(
        {
            key: value[:1] if key.endswith("0.self_attn.q_proj.lora_A.default.weight") else value
            for key, value in tensors.items()
        },
        path,
    )
    with pytest.raises(ValueError, match="one rank"):
        load_trainable(fixture, path, detach=True)


def test_no_dropout_is_left(setup):
    model = setup.model.glus
    assert model.training
    layer = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.MultiheadAttention(4, 1, dropout=0.5))
    layer[1].dropout_p = 0.5
    silence_dropout(layer)
    assert (layer[0].p, layer[1].dropout_p) == (0, 0)
    assert not any(part.p for part in model.modules() if isinstance(part, torch.nn.Dropout))


def detach_rows(setup: Setup, off: LoadedModel, on: LoadedModel) -> dict[str, str]:
    rows: list[Row] = []
    replay_detach(rows, replace(setup, model=off), on.glus)
    assert len(rows) == 11
    return not_passed({row.quantity: row for row in rows})


def test_detach_is_seen(setup, recorded):
    """Where the setting has no effect, the rows fail that say it has one."""
    off, on = setup.model, load_trainable(read_fixture(recorded), setup.folder / "lora.pt", detach=False)
    assert not detach_rows(setup, off, on)
    without = ("a gradient reaches every memory", "a gradient reaches every memory attention")
    same = "gradients differ from detach: true"
    assert detach_rows(setup, off, off) == dict.fromkeys([*without, same], "fail")
    reaching = ("no gradient reaches a memory", "no gradient reaches the memory attention")
    assert detach_rows(setup, on, on) == dict.fromkeys([*reaching, same], "fail")


def test_one_query_frame_has_no_memory_to_detach(setup):
    batch = replace(
        setup.batch,
        query_pixels=[frames[:0] for frames in setup.batch.query_pixels],
        query_frames=[frames[:1] for frames in setup.batch.query_frames],
        rows=replace(setup.batch.rows, reads_R=setup.batch.rows.reads_R.unflatten(0, (-1, 2))[:, 0]),
        target_masks=[mask[:1] for mask in setup.batch.target_masks],
        context_pixels=[
            torch.cat(both) for both in zip(setup.batch.context_pixels, setup.batch.query_pixels, strict=True)
        ],
    )
    rows: list[Row] = []
    replay_detach(rows, replace(setup, batch=batch), setup.model.glus)
    assert [row.status for row in rows] == ["absent"]
