"""A zip for a server is right, or there is none."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import ExpectedCounts, Layout
from glus.data.predictions import encode_png
from glus.evaluation.submission import build_submission
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
