"""A zip for a server is right, or there is none; so is a submission of lmms-eval, which has points in our masks."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, ExpectedCounts, Layout
from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.frames import FrameStore
from glus.data.predictions import encode_png
from glus.evaluation.submission import build_submission, innermost, write_lmms_eval
from tests.evaluation.predicted import true_masks, write_png, write_rle
from tests.layouts import WRITERS, Written

TOPS = {Layout.mevis: "", Layout.ref_youtube_vos_valid: "Annotations/"}
VIDEO = "valid0"


@pytest.fixture(params=TOPS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    """A split that is scored by a server: two videos."""
    return WRITERS[request.param](tmp_path / "data", "valid")


@pytest.fixture
def predictions(written: Written, tmp_path: Path) -> Path:
    """Random masks of 0 and 1, as PNGs."""
    rng = np.random.default_rng(0)
    masks = {key: rng.random(mask.shape) < 0.1 for key, mask in true_masks(written).items()}
    write_rle(tmp_path / "rle", written.dataset, masks)
    return write_png(tmp_path / "predictions", written.dataset, masks, value=1)


def test_the_zip_holds_every_mask(written: Written, predictions: Path, tmp_path: Path) -> None:
    top = TOPS[written.dataset.layout]
    made = build_submission(written.dataset, predictions, tmp_path / "out" / "x.zip")
    assert made.num_expressions == len(written.truth)
    assert made.num_masks == 5 * len(written.truth)
    with zipfile.ZipFile(made.path) as opened:
        assert sorted(opened.namelist()) == sorted(
            f"{top}{video}/{exp_id}/{frame}.png" for video, exp_id in written.truth for frame in written.frames[video]
        )
        for name in opened.namelist():
            with Image.open(io.BytesIO(opened.read(name))) as image:
                assert image.mode == "L"
                pixels = np.asarray(image)
            with Image.open(predictions / name.removeprefix(top)) as image:
                assert (pixels == np.asarray(image) * 255).all()
    assert [path.name for path in made.path.parent.iterdir()] == ["x.zip"]


def test_form_and_number_of_processes_change_no_byte(written: Written, predictions: Path, tmp_path: Path) -> None:
    made = [
        build_submission(written.dataset, folder, tmp_path / f"{number}.zip", num_workers).path.read_bytes()
        for number, (folder, num_workers) in enumerate(((predictions, 1), (tmp_path / "rle", 1), (predictions, 2)))
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("00000.png", None, "frame 00000: .*00000.png is missing"),
        ("00000.png", b"\x89PNG", "frame 00000: .* is not a readable PNG"),
        ("00000.png", encode_png(np.zeros((9, 9))), "frame 00000: .* is 9x9, but the video's frames are 36x52"),
    ],
)
def test_unusable_predictions_make_no_zip(
    name: str, content: bytes | None, message: str, written: Written, predictions: Path, tmp_path: Path
) -> None:
    path = predictions / VIDEO / "1" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot be submitted: 1 problems\n  .*{VIDEO}/1, {message}"):
        build_submission(written.dataset, predictions, tmp_path / "out/deep/x.zip")
    assert not (tmp_path / "out").exists()


def test_the_split_must_be_the_published_one(written: Written, predictions: Path, tmp_path: Path) -> None:
    for counts, message in (
        (ExpectedCounts(videos=140), "has 2 videos, but the server expects 140"),
        (ExpectedCounts(frames=99), "has 10 frames, but the server expects 99"),
    ):
        with pytest.raises(ValueError, match=message):
            build_submission(replace(written.dataset, expected=counts), predictions, tmp_path / "x.zip")
    with pytest.raises(ValueError, match=r"expected the name of a \.zip"):
        build_submission(written.dataset, predictions, tmp_path / "x.tar")
    assert not list(tmp_path.glob("x.*"))


def test_other_benchmarks_have_no_server(tmp_path: Path) -> None:
    dataset = WRITERS[Layout.reason_vos](tmp_path / "data", "valid").dataset
    with pytest.raises(ValueError, match="layout reason_vos; servers take mevis, mevis_v2, ref_youtube_vos_valid"):
        build_submission(dataset, tmp_path, tmp_path / "x.zip")


def test_what_is_no_mask_of_two_values_makes_no_zip(written: Written, predictions: Path, tmp_path: Path) -> None:
    path = predictions / VIDEO / "1/00000.png"
    Image.fromarray(np.asarray(Image.open(path)) * 218 + 12).save(path)
    with pytest.raises(ValueError, match=rf"1 problems\n  1 masks hold more values .*: {path}; make them 0 and 255"):
        build_submission(written.dataset, predictions, tmp_path / "x.zip")


def test_masks_that_cover_the_frame_are_counted(written: Written, predictions: Path, tmp_path: Path) -> None:
    assert build_submission(written.dataset, predictions, tmp_path / "x.zip").doubts == []
    frame = written.frames[VIDEO][1]
    path = predictions / VIDEO / "1" / f"{frame}.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    made = build_submission(written.dataset, predictions, tmp_path / "x.zip")
    name = f"{written.dataset.name}/{VIDEO}/1, frame {frame}"
    assert made.doubts == [f"1 masks cover the whole frame; the first: {name}"]


def records(dataset: DatasetConfig) -> list[dict[str, Any]]:
    """As lmms-eval writes them, of a model that answered nothing; frames of 28 x 24, whatever those of the split."""
    return [
        {
            "id": f"mevis_track_{number}", "qid": number, "video": e.video, "expression": f"{e.text.upper()}.",
            "prediction": "", "tracks": [], "width": 28, "height": 24, "fps": 2, "sampling_fps": 1,
            "n_frames": len(e.frames), "mask_ids": ["0"], "f1": 0.0, "HOTA": 0.0,
        }
        for number, e in enumerate(read_expressions(dataset))
    ]  # fmt: skip


def test_points_lie_in_our_masks(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "mevis_submission.json"
    theirs.write_text(json.dumps(records(dataset)))
    assert write_lmms_eval(dataset, perfect, theirs, tmp_path / "ours.json") == 5
    ours, masks, num_points = json.loads((tmp_path / "ours.json").read_text()), open_masks(dataset), 0
    for record, expression in zip(ours, read_expressions(dataset), strict=True):
        assert record["qid"] == int(record["id"].split("_")[-1])
        assert "f1" not in record
        assert "not comparable" in record["note"]
        height, width = FrameStore(dataset).size(expression.video, expression.frames[0])
        target_THW = masks.read(expression, range(len(expression.frames)), (height, width)) > 0
        shown = [frame for frame in range(0, len(expression.frames), 2) if target_THW[frame].any()]
        assert [(track["frame"], track["time"]) for track in record["tracks"]] == [(f, f / 2) for f in shown]
        for track in record["tracks"]:
            ((x, y),) = (point["point"] for point in track["points"].values())
            assert target_THW[track["frame"]][int(y / 24 * height), int(x / 28 * width)]
            num_points += 1
        assert len(re.findall(r"\d+\.\d\d 0 \d+ \d+", record["prediction"])) == len(shown)
    assert num_points > 4


def test_the_innermost_point_is_inside_also_of_what_touches_the_edge() -> None:
    ring = np.ones((20, 30), bool)
    ring[3:17, 3:20] = False
    x, y = innermost(ring)
    assert ring[int(y * 20), int(x * 30)]
    assert x > 0.7
    single = np.zeros((5, 5), bool)
    single[0, 4] = True
    assert innermost(single) == (0.9, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expression": "the moon"}, "mevis_track_0: tiny has no .* sentence 'the moon' of this video"),
        ({"n_frames": 99}, "mevis_track_0: 99 frames, of which the split has"),
        ({"video": None, "id": "x"}, "x: tiny has no"),
    ],
)
def test_what_does_not_fit_is_named(
    dataset: DatasetConfig, perfect: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    theirs = tmp_path / "theirs.json"
    first, *others = records(dataset)
    theirs.write_text(json.dumps([{**first, **change}, *others]))
    with pytest.raises(ValueError, match=message):
        write_lmms_eval(dataset, perfect, theirs, tmp_path / "ours.json")
    theirs.write_text(json.dumps({"records": others}))
    with pytest.raises(ValueError, match="expected a list of records"):
        write_lmms_eval(dataset, perfect, theirs, tmp_path / "ours.json")
    assert not (tmp_path / "ours.json").exists()
