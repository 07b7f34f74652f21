"""tools/check_data.py finds what is planted, names it, and finds nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from glus.config import DatasetConfig, ExpectedCounts, Layout
from glus.data.benchmarks.index import read_expressions
from glus.data.check import Check, DataReport, VideoFindings, check_dataset
from glus.data.masks import encode_rle
from glus.shapes.write import write_shapes
from tests.edits import edit_json
from tests.layouts import SIZE, WRITERS
from tests.programs import run_program

SPLITS = {
    **dict.fromkeys((Layout.ref_youtube_vos_valid, Layout.reason_vos, Layout.ref_sav), "valid"),
    Layout.groundmore: "trainval",
}
Plant = Callable[[Path], Any]


@dataclass(frozen=True)
class Defect:
    """What is done to a clean dataset, and the one error that must come of it."""

    layout: Layout
    plant: Plant
    check: Check
    message: str
    """Regular expression."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], DatasetConfig]:
    """A dataset of a layout, written once."""
    written: dict[Layout, DatasetConfig] = {}

    def write(layout: Layout) -> DatasetConfig:
        if layout not in written:
            root = tmp_path_factory.mktemp(layout.value) / "sets" / layout.value
            written[layout] = WRITERS[layout](root, SPLITS.get(layout, "train")).dataset
        return written[layout]

    return write


@pytest.fixture
def copy(clean: Callable[[Layout], DatasetConfig], tmp_path: Path) -> Callable[[Layout], DatasetConfig]:
    """The same, to be spoilt."""

    def copy_dataset(layout: Layout) -> DatasetConfig:
        dataset = clean(layout)
        root = tmp_path / "sets" / layout.value
        shutil.copytree(Path(dataset.root).parent, root.parent)
        return replace(dataset, root=str(root))

    return copy_dataset


def problems(report: DataReport) -> dict[Check, list[str]]:
    return {check: row.errors for check, row in report.rows.items() if row.errors}


def meta(change: Callable[[dict[str, Any]], Any], file: str = "train/meta_expressions.json") -> Plant:
    """Change the video train0 of an expression file."""
    return lambda root: edit_json(root / file, lambda content: change(content["videos"]["train0"]))


def expression(exp_id: str, **values: Any) -> Plant:
    return meta(lambda video: video["expressions"][exp_id].update(values))


def masks(change: Callable[[dict[str, list[Any]]], Any]) -> Plant:
    return lambda root: edit_json(root / "train/mask_dict.json", change)


def cut(file: str, size: int) -> Plant:
    return lambda root: (root / file).write_bytes((root / file).read_bytes()[:size])


def resize(file: str) -> Plant:
    def halve(root: Path) -> None:
        image = Image.open(root / file)
        image.resize((SIZE[1] // 2, SIZE[0] // 2), Image.Resampling.NEAREST).save(root / file)

    return halve


def to_grey(root: Path) -> None:
    """What OpenCV makes of palettes: 1, 2, 3 become shades of grey."""
    for path in (root / "train/Annotations/train0").iterdir():
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))


def to_rgb(root: Path) -> None:
    path = root / "train/Annotations/train0/00015.png"
    Image.open(path).convert("RGB").save(path)


def to_binary(root: Path) -> None:
    for path in (root / "train/Annotations/train0/0").iterdir():
        Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8)).save(path)


def twice(file: str, before: str, after: str) -> Plant:
    """Put text into a file by hand, as json.dump would not."""

    def replace_once(root: Path) -> None:
        text = (root / file).read_text()
        assert before in text
        (root / file).write_text(text.replace(before, after, 1))

    return replace_once


def remove(path: str) -> Plant:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


MEVIS, YOUTUBE, LONG, REASON = Layout.mevis, Layout.ref_youtube_vos, Layout.long_rvos, Layout.reason_vos
JPEG, PNG, MOSE = "train/JPEGImages/train0", "train/Annotations/train0", "Annotations/MOSE_reason0_1"
LATE_MASK = "annotations/clip0_0100_0104/masks/frame_000020.png"
"""Of GroundMoRe, behind what its questions are about."""
META, YOUTUBE_META = "train/meta_expressions.json", "meta_expressions/train/meta_expressions.json"
NAME, ODD = "mevis/train0/1, frame 00002, annotation 9", {"size": [SIZE[0], SIZE[1] + 1], "counts": "0"}
SHORT = {"size": list(SIZE), "counts": encode_rle(np.ones((2, 2)))}

DEFECTS = {
    "missing frame": Defect(
        MEVIS, remove(f"{JPEG}/00002.jpg"), Check.frames,
        "frame mevis/train0/00002 is missing; expected .*JPEGImages/train0/00002.jpg",
    ),
    "missing video": Defect(MEVIS, remove(JPEG), Check.frames, "mevis/train0: none of its 5 frames is there"),
    "no frames at all": Defect(MEVIS, remove("train/JPEGImages"), Check.files, "no folder of frames; expected .*JPEG"),
    "frame of another size": Defect(
        MEVIS, resize(f"{JPEG}/00003.jpg"), Check.sizes, "train0/00003 is 18x26, but 4 frames of the video are 36x"
    ),
    "truncated JPEG": Defect(MEVIS, cut(f"{JPEG}/00003.jpg", 900), Check.pixels, "train0/00003 does not decode: .*/"),
    "empty JPEG": Defect(MEVIS, cut(f"{JPEG}/00003.jpg", 0), Check.pixels, "train0/00003 does not decode: .*/"),
    "other split folder": Defect(
        MEVIS, lambda root: (root / "train").rename(root / "Train"), Check.files,
        "no expression file; expected .*mevis/train/meta_expressions.json$",
    ),
    "no mask file": Defect(MEVIS, remove("train/mask_dict.json"), Check.files, "no masks at .*mask_dict.json; a split"),
    "mask file cut short": Defect(
        MEVIS, cut("train/mask_dict.json", 700), Check.files, r"mask_dict.json is no JSON: .*\(char 6"
    ),
    "duplicated annotation id": Defect(
        MEVIS, twice("train/mask_dict.json", '"8"', '"7"'), Check.files, "is no JSON: key '7' stands twice"
    ),
    "bad RLE": Defect(
        MEVIS, masks(lambda ids: ids["9"].__setitem__(2, SHORT)), Check.codes,
        f"{NAME} in .*mask_dict.json does not decode: its runs cover 4 pixels instead of {SIZE[0] * SIZE[1]}",
    ),
    "neither RLE nor null": Defect(
        MEVIS, masks(lambda ids: ids["9"].__setitem__(2, "0")), Check.codes, f"{NAME} .*expected null or .* found '0'"
    ),
    "mask of another size": Defect(
        MEVIS, masks(lambda ids: ids["9"].__setitem__(2, ODD)), Check.codes, f"{NAME} .* is 36x53, but the frame is 36x"
    ),
    "short mask list": Defect(
        MEVIS, masks(lambda ids: ids["9"].pop()), Check.codes,
        "mevis/train0/1: annotation 9 .*mask_dict.json has 4 entries; expected one for each of the video's 5",
    ),
    "unknown annotation id": Defect(
        MEVIS, expression("1", anno_id=[999]), Check.codes, "mevis/train0/1: .*mask_dict.json has no annotation '999'"
    ),
    "annotation of another video": Defect(
        MEVIS, expression("1", anno_id=[12]), Check.sentences,
        "annotation 12 belongs to both mevis/train1/1 and mevis/train0/1",
    ),
    "more objects than annotations": Defect(
        MEVIS, expression("1", obj_id=[2, 0]), Check.sentences, r"'train0'.*expressions\['1'\]: 2 obj_id but 1 anno_id"
    ),
    "duplicated frame name": Defect(
        MEVIS, meta(lambda video: video["frames"].__setitem__(1, "00000")), Check.sentences,
        r"videos\['train0'\].frames: expected distinct frame names",
    ),
    "duplicated exp_id": Defect(
        MEVIS, twice(META, '{"1": {', '{"1": {"exp": "first"}, "1": {'), Check.sentences, "key '1' stands twice"
    ),
    "duplicated video": Defect(
        MEVIS, twice(META, '"train1":', '"train0":'), Check.sentences, "key 'train0' stands twice"
    ),
    "misnamed field": Defect(
        MEVIS, meta(lambda video: video["expressions"].update({"0": {"expression": "a disk"}})), Check.sentences,
        r"videos\['train0'\].expressions\['0'\]: expected a str under 'exp', found nothing",
    ),
    "empty text": Defect(MEVIS, expression("0", exp=" "), Check.sentences, "mevis/train0/0 has no text"),
    "one expression without ids": Defect(
        MEVIS, meta(lambda video: video["expressions"].update({"0": {"exp": "a disk"}})), Check.sentences,
        "1 expressions have no 'obj_id' though others do; first: train0/0",
    ),
    "RGB instead of palette": Defect(YOUTUBE, to_rgb, Check.codes, "train0, frame 00015: .*00015.png has mode RGB"),
    "palette turned to grey": Defect(
        YOUTUBE, to_grey, Check.visible, "train0/0: object 2 is in none of the 5 masks of the video"
    ),
    "object id in no mask": Defect(
        YOUTUBE, meta(lambda video: video["expressions"]["1"].update(obj_id="9"), YOUTUBE_META), Check.visible,
        "train0/1: object 9 is in none of the 5 masks",
    ),
    "truncated PNG": Defect(YOUTUBE, cut(f"{PNG}/00015.png", -30), Check.codes, "train0, frame 00015 does not decode"),
    "missing PNG": Defect(
        YOUTUBE, remove(f"{PNG}/00015.png"), Check.masks, "train0, frame 00015 is missing; expected .*train0/00015.png"
    ),
    "PNG of another size": Defect(
        YOUTUBE, resize(f"{PNG}/00015.png"), Check.codes, "frame 00015: .* is 18x26, but the frame is 36x52"
    ),
    "background as object": Defect(
        YOUTUBE, meta(lambda video: video["expressions"]["1"].update(obj_id="0"), YOUTUBE_META), Check.sentences,
        r"expressions\['1'\]: obj_id 0 is the background",
    ),
    "foreground of 1 instead of 255": Defect(
        LONG, to_binary, Check.codes, "long_rvos/train0/0, frame 00000: .* values up to 1; expected foreground of 255"
    ),
    "missing folder of masks": Defect(
        LONG, remove("train/Annotations/train0/2"), Check.masks, "long_rvos/train0/2 are missing; expected .*train0/2"
    ),
    "resized picture": Defect(
        Layout.refcoco, resize("../images/mscoco/images/train2014/COCO_train2014_000000000001.jpg"), Check.codes,
        "annotation 2 in .*instances.json is 36x52, but the frame is 18x26",
    ),
    "repeated identity": Defect(
        REASON, lambda root: edit_json(
            root / "meta_expressions.json", lambda c: c["videos"]["reason0"]["expressions"][1].update(exp_id=0)
        ), Check.sentences, "MOSE_reason0_1/0 stands there twice",
    ),
}  # fmt: skip


def palette(change: Callable[[Image.Image], Image.Image], rows: slice = slice(None)) -> Plant:
    """Change palette masks of train0."""

    def save(root: Path) -> None:
        for path in sorted((root / PNG).iterdir())[rows]:
            change(Image.open(path)).save(path)

    return save


THIRD = slice(2, 3)


def smooth(image: Image.Image) -> Image.Image:
    """What resizing by an editor makes of the numbers."""
    numbers = np.asarray(image).astype(np.float32) * 60
    return Image.fromarray(cv2.GaussianBlur(numbers, (5, 5), 2).astype(np.uint8))


def exchange(image: Image.Image) -> Image.Image:
    """Other numbers, the same colours."""
    colours = image.getpalette() or []
    other = Image.fromarray(np.asarray([1, 0, 2, 3], np.uint8)[np.asarray(image)])
    other.putpalette(colours[3:6] + colours[:3] + colours[6:])
    return other


def exchange_grey(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray([1, 0, 2, 3], np.uint8)[np.asarray(image)])


def to_jpeg(root: Path) -> None:
    path = root / PNG / "00015.png"
    Image.fromarray(np.asarray(Image.open(path))).save(path, format="JPEG", quality=100)


def tag(path: Path, orientation: int) -> None:
    image = Image.open(path)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif)


ODD_MASKS = {
    "smoothed": (YOUTUBE, palette(smooth), "train0: 5 of 5 mask files hold values that no sentence .*.png: "),
    "JPEG": (YOUTUBE, to_jpeg, "train0: 1 of 5 mask files are no PNG but JPEG, .*00015.png"),
    "JPEG of one object": (
        LONG, lambda root: Image.open(root / PNG / "0/00000.png").save(root / PNG / "0/00000.png", format="JPEG"),
        "train0: 1 of 5 mask files are no PNG but JPEG",
    ),
    "other numbers": (
        YOUTUBE, palette(exchange), r"5 of 5 mask files give 0, the background, another .*.png: \(254, 1, 7\)"
    ),
    "other numbers once": (YOUTUBE, palette(exchange, THIRD), "1 of 5 mask files give 0, .* colour"),
    "other numbers, no colours": (
        YOUTUBE, palette(exchange_grey, THIRD), "mask files have 0 where another number was in the frame before"
    ),
    "turned": (
        YOUTUBE, lambda root: tag(root / PNG / "00015.png", 6),
        "1 of 5 mask files have an EXIF orientation, which does not turn masks; the first: .*00015.png",
    ),
    "no sentence": (
        YOUTUBE, palette(lambda image: Image.fromarray(np.asarray(image) * np.uint8(2))),
        "mask files hold values that no sentence and no meta.json names",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "plant", "message"), ODD_MASKS.values(), ids=ODD_MASKS)
def test_mask_files_that_do_not_keep_numbers_are_told_of(copy, layout: Layout, plant: Plant, message: str) -> None:
    dataset = copy(layout)
    plant(Path(dataset.root))
    warnings = check_dataset(dataset).rows[Check.codes].warnings
    assert any(re.search(message, warning) for warning in warnings), warnings


def test_objects_that_meta_json_lists_need_no_sentence(copy) -> None:
    dataset = copy(YOUTUBE)
    edit_json(Path(dataset.root) / YOUTUBE_META, lambda c: c["videos"]["train0"]["expressions"].pop("0"))
    first = [e for e in read_expressions(dataset) if e.video == "train0"]
    assert "hold values that no sentence" in check_dataset(dataset).rows[Check.codes].warnings[0]
    meta_json = Path(dataset.root) / "train/meta.json"
    meta_json.write_text(json.dumps({"videos": {first[0].video: {"objects": {str(i): {} for i in range(1, 9)}}}}))
    assert check_dataset(dataset).num_warnings == 0
    meta_json.write_text(json.dumps({"videos": {"train0": {}}}))
    assert "expected a dict under 'objects'" in problems(check_dataset(dataset))[Check.files][0]


def test_a_mask_that_is_a_bomb_is_an_error_of_its_video(copy, monkeypatch) -> None:
    dataset = copy(YOUTUBE)
    path = Path(dataset.root) / PNG / "00015.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1])
    Image.fromarray(np.zeros((4 * SIZE[0], SIZE[1]), np.uint8)).save(path)
    report = check_dataset(dataset)
    assert list(problems(report)) == [Check.codes]
    assert "train0, frame 00015 does not decode" in problems(report)[Check.codes][0]
    assert report.rows[Check.frames].examined == "2 videos, 10 frames"


def test_half_a_character_is_named_and_the_rest_checked(copy) -> None:
    dataset = copy(MEVIS)
    expression("0", exp="a red \ud83d disk")(Path(dataset.root))
    remove("train/JPEGImages/train1/00002.jpg")(Path(dataset.root))
    found = problems(check_dataset(dataset))
    assert found.keys() == {Check.sentences, Check.frames}
    assert re.search(r"mevis/train0/0 is no text .* 'a red \\ud83d disk'", found[Check.sentences][0])


@pytest.mark.parametrize("name", ["{}", "frame_{}"])
def test_numbers_of_frames_that_do_not_ascend_are_told_of(copy, name: str) -> None:
    dataset = copy(MEVIS)
    names = [name.format(number) for number in (0, 1, 10, 11, 2)]
    folder = Path(dataset.root) / JPEG
    for old, new in zip(sorted(folder.iterdir()), names, strict=True):
        old.rename(folder / f"{new}.jpg")
    meta(lambda video: video.update(frames=names))(Path(dataset.root))
    report = check_dataset(dataset)
    assert report.num_warnings == 1
    assert "mevis/train0: the numbers of its frames do not ascend" in report.rows[Check.frames].warnings[0]


def test_turned_frames_are_counted(copy) -> None:
    dataset = copy(MEVIS)
    for number in (0, 3):
        tag(Path(dataset.root) / JPEG / f"{number:05d}.jpg", 3)
    report = check_dataset(dataset)
    assert report.num_warnings == 1
    assert "mevis/train0: 2 of 5 frames have an EXIF orientation" in report.rows[Check.pixels].warnings[0]


def test_masks_of_the_frame_before_it_was_turned_are_explained(copy) -> None:
    dataset = copy(YOUTUBE)
    for path in (Path(dataset.root) / "train/JPEGImages/train0").iterdir():
        tag(path, 6)
    found = problems(check_dataset(dataset))
    assert found.keys() == {Check.codes}
    assert "only the frame is turned, by its EXIF orientation?" in found[Check.codes][0]


@pytest.mark.parametrize("layout", list(Layout))
def test_a_clean_dataset_has_no_problem(clean, layout) -> None:
    report = check_dataset(clean(layout), alignment=True)
    assert problems(report) == {}
    assert report.num_warnings == 0
    checked = {check for check, row in report.rows.items() if not row.skipped}
    assert checked == set(Check) - {Check.checksums, Check.counts, Check.leaks}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_found_and_named(copy, defect: Defect) -> None:
    dataset = copy(defect.layout)
    defect.plant(Path(dataset.root))
    found = problems(check_dataset(dataset))
    assert found.keys() == {defect.check}
    assert any(re.search(defect.message, message) for message in found[defect.check]), found


@pytest.mark.parametrize(
    ("check", "known", "message"),
    [
        (Check.counts, {"expected": ExpectedCounts(videos=3)}, "2 videos in .*meta_expressions.json; published are 3"),
        (Check.counts, {"expected": ExpectedCounts(expressions=5)}, "4 expressions in .*; published are 5"),
        (Check.counts, {"expected": ExpectedCounts(objects=1)}, "6 objects in .*; published are 1"),
        (Check.counts, {"expected": ExpectedCounts(frames=11)}, "10 frames in .*; published are 11"),
        (
            Check.checksums,
            {"sha256": {"train/mask_dict.json": "0" * 64}},
            "mask_dict.json has SHA-256 .*; expected 000",
        ),
        (Check.checksums, {"sha256": {"train/x.json": "0" * 64}}, "train/x.json is missing; expected the file of SHA"),
    ],
)
def test_what_is_published_is_compared(clean, check: Check, known: dict[str, Any], message: str) -> None:
    dataset = clean(MEVIS)
    found = problems(check_dataset(replace(dataset, **known)))
    assert found.keys() == {check}
    assert re.search(message, found[check][0])


def test_what_is_published_agrees(clean) -> None:
    dataset = clean(MEVIS)
    digest = hashlib.sha256((Path(dataset.root) / "train/mask_dict.json").read_bytes()).hexdigest()
    known = replace(dataset, expected=ExpectedCounts(2, 4, 6, 10), sha256={"train/mask_dict.json": digest.upper()})
    report = check_dataset(known)
    assert problems(report) == {}
    assert not report.rows[Check.counts].skipped
    assert not report.rows[Check.checksums].skipped


def test_a_video_of_another_split_is_a_leak(clean, tmp_path: Path) -> None:
    """Whatever folders ReVOS has in front of its name."""
    train, revos = clean(MEVIS), clean(Layout.revos)
    test = WRITERS[MEVIS](tmp_path, "valid_u").dataset
    assert problems(check_dataset(train, [test, revos])) == {}
    edit_json(tmp_path / "valid_u/meta_expressions.json", lambda c: c["videos"].update(v1=c["videos"].pop("valid_u1")))
    (tmp_path / "valid_u/JPEGImages/valid_u1").rename(tmp_path / "valid_u/JPEGImages/v1")
    found = problems(check_dataset(test, [train, revos]))
    assert found == {Check.leaks: ["video v1 is also in revos (train), as TAO/train/v1"]}


@pytest.mark.parametrize(
    ("frame_of", "rule"),
    [
        (lambda i: i + 2, "mask i fits frame i +2"),
        (lambda i: i - 1, "mask i fits frame i -1"),
        (lambda i: 2 * i, "mask i fits frame 2 i"),
        (lambda i: i + i // 8, "mask i of the second half fits frame i"),
    ],
)
def test_misaligned_masks_are_found(tmp_path: Path, frame_of: Callable[[int], int], rule: str) -> None:
    """In the one video where mask i is that of another frame."""
    write_shapes(tmp_path, "train", num_videos=3, num_frames=24)
    dataset = DatasetConfig("shapes", MEVIS, str(tmp_path), "train")
    assert check_dataset(dataset, alignment=True).num_warnings == 0
    videos = json.loads((tmp_path / META).read_text())["videos"]
    named = {str(i) for e in videos["train00002"]["expressions"].values() for i in e["anno_id"]}

    def shift(ids: dict[str, list[Any]]) -> None:
        for name in named:
            ids[name] = [ids[name][frame_of(i)] if 0 <= frame_of(i) < 24 else None for i in range(24)]

    edit_json(tmp_path / "train/mask_dict.json", shift)
    assert check_dataset(dataset).num_warnings == 0
    report = check_dataset(dataset, alignment=True)
    assert problems(report) == {}
    warnings = report.rows[Check.alignment].warnings
    assert report.num_warnings == len(warnings) == 1
    assert warnings[0].startswith(f"shapes/train00002: {rule}")


@pytest.mark.parametrize(
    ("layout", "plant", "check", "message"),
    [
        (MEVIS, masks(lambda ids: ids.update({"9": [None] * 5})), Check.visible, "train0/1: object 9 is in none of"),
        (REASON, remove(f"{MOSE}/00001.png"), Check.masks, "reason0/1_0: 1 of 5 frames have no"),
        (
            REASON, lambda root: [
                shutil.copy(root / MOSE / "00001.png", root / MOSE / f"000{number}.png") for number in (10, 11)
            ], Check.masks, "reason0/1_0: 2 mask files are of frames that the expression file does not list",
        ),
        (
            Layout.groundmore, lambda root: edit_json(
                root / "trainval_v2.json",
                lambda c: c["videos"]["clip0_0100_0104"]["questions"]["0"].update(action_end="01:00"),
            ), Check.visible, "clip0_0100_0104/0: object 1@6:-1 is in none of the 24 masks",
        ),
        (
            Layout.groundmore, cut(LATE_MASK, 60), Check.codes,
            "1 of 23 mask files do not decode, in frames that no sentence is about; the first: .*frame_000020.png: ",
        ),
        (
            Layout.ref_davis17, lambda root: edit_json(
                root / YOUTUBE_META, lambda c: c["videos"]["train-0"]["expressions"]["0"].update(obj_id="9")
            ), Check.visible, "train-0/0: object 9 is in none of the 5 masks",
        ),
        (MEVIS, expression("1", obj_id=[0]), Check.sentences, "object 0 is annotation 7 in .*/0, but 9 in .*/1"),
        (MEVIS, lambda root: WRITERS[MEVIS](root, "valid"), Check.files, "valid names no objects"),
    ],
)  # fmt: skip
def test_what_may_be_right_is_a_warning(copy, layout: Layout, plant: Plant, check: Check, message: str) -> None:
    dataset = copy(layout)
    if "valid names" in message:
        dataset = replace(dataset, split="valid")
    plant(Path(dataset.root))
    report = check_dataset(dataset)
    assert problems(report) == {}
    assert report.num_warnings == len(report.rows[check].warnings) == 1
    assert re.search(message, report.rows[check].warnings[0])


def test_a_mask_of_another_size_ends_no_check_where_no_sentence_asks_for_it(copy) -> None:
    dataset = copy(Layout.groundmore)
    resize(LATE_MASK)(Path(dataset.root))
    report = check_dataset(dataset)
    assert problems(report) == {}
    assert report.rows[Check.codes].examined == "144 masks"


def test_empty_masks_are_counted(clean) -> None:
    assert check_dataset(clean(MEVIS)).rows[Check.visible].examined == "30 masks, 2 of them empty"


def test_processes_find_the_same(copy) -> None:
    dataset = copy(YOUTUBE)
    to_grey(Path(dataset.root))
    done = []

    def count(found: Iterable[VideoFindings], num_videos: int) -> Iterator[VideoFindings]:
        for number, findings in enumerate(found, 1):
            done.append((number, num_videos))
            yield findings

    report = check_dataset(dataset, num_workers=2, progress=count)
    assert report.as_json() == check_dataset(dataset).as_json()
    assert done == [(1, 2), (2, 2)]


def run(tmp_path: Path, dataset: DatasetConfig, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The program, in an empty folder."""
    (tmp_path / "cwd").mkdir()
    arguments = ("dataset=mevis_train", f"dataset.root={dataset.root}", *overrides)
    return run_program("tools/check_data.py", *arguments, folder=tmp_path / "cwd")


def test_the_program_warns_and_goes_on(copy, tmp_path: Path) -> None:
    dataset = copy(MEVIS)
    masks(lambda ids: ids.update({"9": [None] * 5}))(Path(dataset.root))
    counts = ["dataset.expected.videos=2", "dataset.expected.expressions=4", "~dataset.sha256"]
    done = run(tmp_path, dataset, *counts, "num_workers=1")
    assert done.returncode == 0, done.stderr
    assert "1 warning objects in sight" in done.stdout
    assert json.loads((tmp_path / "cwd/outputs/check_data/mevis.json").read_text())["num_warnings"] == 1
    assert [path.name for path in (tmp_path / "cwd").iterdir()] == ["outputs"]  # Hydra leaves nothing behind


def test_the_program_fails_with_errors(copy, tmp_path: Path) -> None:
    """All of them in the JSON file, the first of each kind on the screen."""
    dataset = copy(MEVIS)
    against = "against=[mevis_valid_u]"
    WRITERS[MEVIS](tmp_path / "data/mevis", "valid_u")
    edit_json(
        tmp_path / "data/mevis/valid_u/meta_expressions.json",
        lambda content: content["videos"].update(train1=content["videos"].pop("valid_u1")),
    )
    done = run(tmp_path, dataset, against, f"paths.data={tmp_path / 'data'}", "output=found.json")
    assert done.returncode == 1
    assert "2 videos in" in done.stdout
    assert "video train1 is also in mevis_valid_u (valid_u), as train1" in done.stdout
    found = json.loads((tmp_path / "cwd/found.json").read_text())
    assert found["num_errors"] == sum(len(row["errors"]) for row in found["checks"].values())
    assert [name for name, row in found["checks"].items() if row["errors"]] == ["checksums", "counts", "leaks"]


def test_the_program_shows_any_sentence_on_a_terminal_of_ascii(copy, tmp_path: Path) -> None:
    dataset = copy(MEVIS)
    expression("0", exp="\ud83d 猫")(Path(dataset.root))
    (tmp_path / "cwd").mkdir()
    arguments = ("dataset=mevis_train", f"dataset.root={dataset.root}")
    done = run_program("tools/check_data.py", *arguments, folder=tmp_path / "cwd", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert "mevis/train0/0 is no text that can be written as UTF-8" in done.stdout
    assert "Traceback" not in done.stderr
