"""Folders that are complete or absent, and that belong to one model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, InferenceConfig, ModelFolderConfig
from glus.data.index import read_expressions
from glus.inference.writer import IDENTITY_FILE, MaskFolder, PredictionWriter, prediction_identity, whole_folder
from glus.models.build import LoadedModel
from glus.structures import Expression

IDENTITY = {"dataset": {"name": "d"}, "inference": {"memory_stride": 3}}
EXPRESSION = Expression("d", "deep/er/video", "10", "the cat", ("f 1", "2"), (), ())
MASK = np.array([[True, False, False], [False, False, False]])


def fail_after(action: Callable[[], None]) -> None:
    action()
    raise ValueError("something went wrong")


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_masks_appear_together_under_the_names_of_the_frames(tmp_path):
    writer = PredictionWriter(tmp_path / "out", IDENTITY, {})
    assert not writer.is_done(EXPRESSION)
    with writer.open(EXPRESSION) as folder:
        folder.write("f 1", MASK, 0.25, True)
        assert not writer.is_done(EXPRESSION)
        assert not writer.path(EXPRESSION).exists()
        folder.write("2", ~MASK, 0.75, False)
    assert writer.is_done(EXPRESSION)
    below = [f"deep/er/video/10/{name}" for name in ("2.png", "answers.json", "f 1.png")]
    assert everything_below(tmp_path / "out") == [*below, IDENTITY_FILE]
    with Image.open(writer.path(EXPRESSION) / "f 1.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), MASK * np.uint8(255))
    assert writer.answers(EXPRESSION) == [
        {"frame": "f 1", "area": pytest.approx(1 / 6, abs=1e-6), "score": 0.25, "has_seg": True},
        {"frame": "2", "area": pytest.approx(5 / 6, abs=1e-6), "score": 0.75, "has_seg": False},
    ]


def test_an_error_leaves_nothing(tmp_path):
    writer = PredictionWriter(tmp_path, IDENTITY, {})
    with pytest.raises(ValueError, match="wrong"), writer.open(EXPRESSION) as folder:
        fail_after(lambda: folder.write("f 1", MASK, 0.5, True))
    assert everything_below(tmp_path) == [IDENTITY_FILE]


def test_what_a_killed_run_left_is_not_taken_over(tmp_path):
    writer = PredictionWriter(tmp_path, IDENTITY, {})
    writer.open(EXPRESSION).write("stale", MASK, 0.5, True)  # never closed, as after kill -9
    assert not writer.is_done(EXPRESSION)
    writer = PredictionWriter(tmp_path, IDENTITY, {})
    with writer.open(EXPRESSION) as folder:
        folder.write("f 1", MASK, 0.5, True)
    assert not any("stale" in name or "tmp" in name for name in everything_below(tmp_path))


def test_another_model_or_setting_is_refused(tmp_path):
    PredictionWriter(tmp_path, IDENTITY, {"run": 1})
    PredictionWriter(tmp_path, IDENTITY, {"run": 2})
    assert json.loads((tmp_path / IDENTITY_FILE).read_text()) == {"identity": IDENTITY, "run": 1}
    other = {**IDENTITY, "inference": {"memory_stride": 1}}
    with pytest.raises(ValueError, match=r"inference.memory_stride: 3 there, 1 now.*choose another output_dir"):
        PredictionWriter(tmp_path, other, {})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' but no predict.json"):
        PredictionWriter(tmp_path, IDENTITY, {})


def test_identity_tells_what_decides_masks(
    dataset: DatasetConfig, tiny_model: LoadedModel, model_folder: Path, tmp_path: Path
):
    expressions = read_expressions(dataset)
    settings = tiny_model.config
    identity = prediction_identity(dataset, expressions, model_folder, settings)
    assert identity == json.loads(json.dumps(identity))

    moved = replace(dataset, root="elsewhere")
    model = replace(settings.model, llm=replace(settings.model.llm, tokenizer="elsewhere"))
    assert prediction_identity(moved, expressions, model_folder, replace(settings, model=model)) == identity

    strided = replace(settings, inference=InferenceConfig(memory_stride=7))
    longer = replace(settings, frames=replace(settings.frames, num_query=8))
    assert isinstance(longer, ModelFolderConfig)
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert prediction_identity(dataset, expressions, copy, settings) == identity
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    renamed = [replace(expressions[0], text="another sentence"), *expressions[1:]]
    others = [
        prediction_identity(dataset, expressions, model_folder, strided),
        prediction_identity(dataset, expressions, model_folder, longer),
        prediction_identity(dataset, expressions, copy, settings),
        prediction_identity(dataset, renamed, model_folder, settings),
        prediction_identity(replace(dataset, split="train"), expressions, model_folder, settings),
    ]
    assert all(other != identity for other in others)


def test_whole_folder_appears_at_the_end_or_never(tmp_path):
    path = tmp_path / "result"
    with whole_folder(path, overwrite=False, mark="done.json") as folder:
        (folder / "done.json").touch()
        assert not path.exists()
    assert everything_below(tmp_path) == ["result/done.json"]
    with pytest.raises(ValueError, match="wrong"), whole_folder(path, overwrite=True, mark="done.json") as folder:
        fail_after((folder / "half").touch)
    assert everything_below(tmp_path) == ["result/done.json"]


def test_whole_folder_replaces_only_its_own_and_only_when_told(tmp_path):
    path = tmp_path / "result"
    path.mkdir()
    with whole_folder(path, overwrite=False, mark="done.json") as folder, MaskFolder(folder / "cat") as masks:
        masks.write("1", MASK, 0.5, True)
        (folder / "done.json").touch()
    with pytest.raises(ValueError, match="add --overwrite"), whole_folder(path, overwrite=False, mark="done.json"):
        pass
    with whole_folder(path, overwrite=True, mark="done.json") as folder:
        (folder / "new").touch()
    assert everything_below(tmp_path) == ["result/new"]
    with pytest.raises(ValueError, match=r"no done.json"), whole_folder(path, overwrite=True, mark="done.json"):
        pass
    with pytest.raises(ValueError, match="is a file"), whole_folder(path / "new", overwrite=True, mark="done.json"):
        pass
    assert everything_below(tmp_path) == ["result/new"]
