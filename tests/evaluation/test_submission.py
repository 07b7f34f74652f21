"""A zip for a server is right, or there is none."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import ExpectedCounts, Layout
from glus.evaluation.submission import build_submission, check_zip, encode_png
from tests.evaluation.predicted import true_masks, write_png, write_rle
from tests.layouts import SIZE, WRITERS, Written

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
    assert check_zip(made.path, written.dataset) == []
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


Entries = dict[str, bytes]


def below(folder: str) -> Callable[[Entries, str], Entries]:
    """All entries in one more folder."""
    return lambda entries, _: {f"{folder}/{name}": data for name, data in entries.items()}


def with_mask(data: bytes) -> Callable[[Entries, str], Entries]:
    """Another file in the place of one mask."""
    return lambda entries, top: {**entries, f"{top}{VIDEO}/1/00000.png": data}


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


WRONG_ZIPS: list[tuple[Callable[[Entries, str], Entries], str]] = [
    (below("predictions"), "at the root of the zip, such as .*; found predictions/"),
    (lambda entries, _: {}, "at the root of the zip, such as .*; found nothing"),
    (lambda entries, top: {n: d for n, d in entries.items() if VIDEO not in n}, f"^video {VIDEO} is missing"),
    (lambda entries, top: {n: d for n, d in entries.items() if f"{VIDEO}/1/" not in n}, f"expression {VIDEO}/1 is m"),
    (lambda entries, top: {n: d for n, d in entries.items() if f"{VIDEO}/1/00000" not in n}, "1/00000.png is missing"),
    (lambda entries, top: {**entries, f"{top}{VIDEO}/99/00000.png": b""}, "99/00000.png belongs to no expression"),
    (lambda entries, top: {**entries, "report.json": b"{}"}, "report.json belongs to no expression"),
    (with_mask(b"\x89PNG"), "1/00000.png is not a readable PNG"),
    (with_mask(encode_png(np.zeros((52, 36)))), "1/00000.png is 52x36, but the video's frames are 36x52"),
    (with_mask(png(Image.fromarray(np.ones(SIZE, np.uint8)))), "1/00000.png has values other than 0 and 255"),
    (with_mask(png(Image.fromarray(np.zeros((*SIZE, 3), np.uint8)))), "1/00000.png has mode RGB; expected L"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ZIPS)
def test_what_is_wrong_with_a_zip(
    change: Callable[[Entries, str], Entries], message: str, written: Written, predictions: Path, tmp_path: Path
) -> None:
    made = build_submission(written.dataset, predictions, tmp_path / "right.zip")
    with zipfile.ZipFile(made.path) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(tmp_path / "wrong.zip", "w") as wrong:
        for name, data in change(entries, TOPS[written.dataset.layout]).items():
            wrong.writestr(name, data)
    problems = check_zip(tmp_path / "wrong.zip", written.dataset)
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems[0]


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, 1, "is encrypted; servers read no passwords"),
        (10, 8, "does not unpack: .*invalid stored block"),  # read as a deflate stream, which it is not
        (10, 97, "does not unpack: That compression method is not supported"),
        (16, 0, "does not unpack: Bad CRC-32"),
    ],
)
def test_an_entry_that_does_not_unpack_is_named(
    offset: int, value: int, message: str, written: Written, predictions: Path, tmp_path: Path
) -> None:
    """Its flags, method or checksum is changed in the zip's directory."""
    path = build_submission(written.dataset, predictions, tmp_path / "x.zip").path
    with zipfile.ZipFile(path) as opened:
        name, first = opened.namelist()[0], opened.start_dir
    data = bytearray(path.read_bytes())
    assert data[first + offset] != value
    data[first + offset] = value
    path.write_bytes(data)
    problems = check_zip(path, written.dataset)
    assert len(problems) == 1
    assert re.match(f"{name} {message}", problems[0]), problems[0]


def test_what_is_no_zip(written: Written, predictions: Path, tmp_path: Path) -> None:
    made = build_submission(written.dataset, predictions, tmp_path / "x.zip")
    made.path.write_bytes(made.path.read_bytes()[:-100])
    assert "is not a zip" in check_zip(made.path, written.dataset)[0]
    with pytest.raises(FileNotFoundError, match="no zip"):
        check_zip(tmp_path / "y.zip", written.dataset)


def test_a_name_twice(written: Written, predictions: Path, tmp_path: Path) -> None:
    made = build_submission(written.dataset, predictions, tmp_path / "x.zip")
    name = f"{TOPS[written.dataset.layout]}{VIDEO}/0/00000.png"
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(made.path, "a") as opened:
        opened.writestr(name, encode_png(np.zeros(SIZE)))
    assert check_zip(made.path, written.dataset) == [f"{name} is in it 2 times"]
