"""Every layout, written to disk by ``tests.layouts``, is read back exactly, and its defects are named."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glus.config import Layout
from glus.data.benchmarks.index import expression_path, open_masks, read_expressions, require_annotations
from glus.data.frames import FrameStore
from tests.edits import edit_json
from tests.layouts import SIZE, WRITERS, Written
from tests.layouts.pictures import write_refcoco

SPLITS = {
    Layout.mevis: ("train", "valid_u", "valid"),
    Layout.mevis_v2: ("train", "valid_u", "valid"),
    Layout.ref_youtube_vos: ("train",),
    Layout.ref_youtube_vos_valid: ("valid",),
    Layout.ref_davis17: ("train", "valid"),
    Layout.revos: ("train", "valid"),
    Layout.ref_sav: ("valid",),
    Layout.groundmore: ("trainval", "test"),
    Layout.reason_vos: ("valid",),
    Layout.lvvis: ("train",),
    Layout.long_rvos: ("train", "valid", "test"),
    Layout.refcoco: ("train", "val", "testA", "testB", "test"),
    Layout.reason_seg: ("train", "val", "test"),
}


@pytest.mark.parametrize(("layout", "split"), [(layout, split) for layout in Layout for split in SPLITS[layout]])
def test_a_split_is_read_back_exactly(tmp_path: Path, layout: Layout, split: str) -> None:
    check_reading(WRITERS[layout](tmp_path / "here", split))


def check_reading(written: Written) -> None:
    """Expressions in order with their fields; masks, ignored pixels and frames of each."""
    dataset = written.dataset
    expressions = read_expressions(dataset)
    masks, frames = open_masks(dataset), FrameStore(dataset)
    assert [(e.video, e.exp_id) for e in expressions] == list(written.truth)
    for expression in expressions:
        truth = written.truth[expression.video, expression.exp_id]
        assert (expression.text, expression.group, expression.folder) == (truth.text, truth.group, truth.folder)
        assert (expression.object_ids, expression.frames) == (truth.object_ids, written.frames[expression.video])
        assert frames.size(expression.video, expression.frames[-1]) == SIZE
        every = range(len(expression.frames))
        assert masks.annotated(expression).all()
        read = masks.read(expression, every, SIZE)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, truth.masks_THW)
        if expression.annotation_ids:
            ignored = masks.ignore(expression, every, SIZE)
            assert (ignored is None) == (truth.ignore_THW is None)
            if ignored is not None:
                assert ignored.dtype == bool
                np.testing.assert_array_equal(ignored, truth.ignore_THW)


def first_expression(content: Any) -> Any:
    """Of the usual expression file."""
    video = next(iter(content["videos"].values()))
    return video["expressions"]["0"] if isinstance(video["expressions"], dict) else video["expressions"][0]


@pytest.mark.parametrize(
    ("layout", "edit", "message"),
    [
        (Layout.mevis, lambda e: e.update(obj_id=3), r"train0.*\['0'\]: expected a list of whole numbers"),
        (Layout.mevis, lambda e: e.update(anno_id=["a"] * 2), r"whole numbers under 'anno_id', found \['a'"),
        (Layout.mevis_v2, lambda e: e.pop("obj_id"), r"1 expressions have no 'obj_id'.*train0/0"),
        (Layout.lvvis, lambda e: e.pop("exp"), r"\['0'\]: expected a str under 'exp', found nothing"),
        (Layout.revos, lambda e: e.pop("type_id"), r"whole number under 'type_id', found None"),
        (Layout.revos, lambda e: e.update(type_id=3), r"type_id 3; expected 0 to 2"),
        (Layout.ref_youtube_vos, lambda e: e.pop("obj_id"), r"expected an 'obj_id';.*layout=ref_youtube_vos_valid"),
        (Layout.ref_davis17, lambda e: e.update(obj_id="one"), r"train-0.*whole number .*found 'one'"),
        (Layout.ref_sav, lambda e: e.update(type_id=2), r"type_id 2; expected 0 to 1 \(long, short\)"),
        (Layout.reason_vos, lambda e: e.update(exp_id=1), r"MOSE_reason0_1/1 stands there twice"),
        (Layout.reason_vos, lambda e: e.pop("exp_text"), r"expressions\[0\]: expected a str under 'exp_text'"),
        (Layout.long_rvos, lambda e: e.update(type="x"), r"static or .* under 'type', found 'x'"),
        (Layout.long_rvos, lambda e: e.pop("obj_id"), r"1 expressions have no 'obj_id'"),
    ],
)
def test_a_malformed_expression_says_where(
    tmp_path: Path, layout: Layout, edit: Callable[[Any], object], message: str
) -> None:
    dataset = WRITERS[layout](tmp_path, SPLITS[layout][0]).dataset
    path = expression_path(dataset)
    edit_json(path, lambda content: edit(first_expression(content)))
    with pytest.raises(ValueError, match=message) as caught:
        read_expressions(dataset)
    assert str(path) in str(caught.value)


def ground_more_edit(**changes: Any) -> Callable[[Any], object]:
    return lambda content: content["videos"]["clip0_0100_0104"]["questions"]["0"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ground_more_edit(q_type="Why"), r"\['0'\]: expected Causal or .* under 'q_type', found 'Why'"),
        (ground_more_edit(obj_id="1, 0"), "obj_id 0 is the background of the masks"),
        (ground_more_edit(obj_id="1;2"), r"numbers with commas between them under 'obj_id', found '1;2'"),
        (ground_more_edit(action_end="soon"), r"a time such as 01:05, found 'soon'"),
        (lambda e: e["videos"].update(clip=e["videos"].pop("clip0_0100_0104")), "no folder of frames .*clip/images"),
    ],
)
def test_a_malformed_question_says_where(tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    dataset = WRITERS[Layout.groundmore](tmp_path, "trainval").dataset
    edit_json(expression_path(dataset), edit)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_expressions(dataset)


def test_a_question_without_hours_or_with_them(tmp_path: Path) -> None:
    """The same seconds, of a clip that begins in the second hour."""
    dataset = WRITERS[Layout.groundmore](tmp_path, "trainval").dataset
    edit_json(expression_path(dataset), ground_more_edit(action_start="0:01:02", action_end="00:01:03"))
    first = read_expressions(dataset)[0]
    assert first.annotation_ids == ("1@12:17",)


def test_an_action_outside_its_clip_is_in_no_frame(tmp_path: Path) -> None:
    """It ends where the clip, which begins at 01:00, begins; the authors' program has an empty truth then."""
    dataset = WRITERS[Layout.groundmore](tmp_path, "trainval").dataset
    edit_json(expression_path(dataset), ground_more_edit(action_start="00:58", action_end="01:00"))
    first = read_expressions(dataset)[0]
    assert not open_masks(dataset).read(first, range(len(first.frames)), SIZE).any()


def test_the_frames_of_mevis_2_are_packed_on_its_hub(tmp_path: Path) -> None:
    dataset = WRITERS[Layout.mevis_v2](tmp_path, "valid_u").dataset
    first = read_expressions(dataset)[0]
    shutil.make_archive(str(tmp_path / "valid_u/JPEGImages"), "tar", tmp_path / "valid_u", "JPEGImages")
    shutil.rmtree(tmp_path / "valid_u/JPEGImages")
    with pytest.raises(FileNotFoundError, match=r"is missing; .*: unpack .*valid_u/JPEGImages\.tar first"):
        FrameStore(dataset).read(first.video, first.frames[0])
    shutil.unpack_archive(tmp_path / "valid_u/JPEGImages.tar", tmp_path / "valid_u")
    assert FrameStore(dataset).size(first.video, first.frames[0]) == SIZE


@pytest.mark.parametrize("layout", [layout for layout in Layout if layout is not Layout.reason_seg])
def test_a_missing_expression_file_names_what_was_expected(tmp_path: Path, layout: Layout) -> None:
    written = WRITERS[layout](tmp_path / "here", SPLITS[layout][0])
    path = expression_path(written.dataset)
    path.rename(path.with_name("renamed.json"))
    with pytest.raises(
        FileNotFoundError, match=rf"\({layout.value} layout\) has no expression file; expected "
    ) as caught:
        read_expressions(written.dataset)
    assert str(path) in str(caught.value)


def test_annotation_ids_are_keys_as_they_are_spelled(tmp_path: Path) -> None:
    written = WRITERS[Layout.mevis](tmp_path, "train")

    def spell(content: Any) -> None:
        for video in content["videos"].values():
            for value in video["expressions"].values():
                value["anno_id"] = [f"{number:03d}" for number in value["anno_id"]]

    def rename(masks: Any) -> None:
        for key in list(masks):
            masks[f"{int(key):03d}"] = masks.pop(key)

    edit_json(tmp_path / "train/meta_expressions.json", spell)
    edit_json(tmp_path / "train/mask_dict.json", rename)
    check_reading(written)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_long_rvos_needs_types_where_it_is_scored(tmp_path: Path, split: str) -> None:
    dataset = WRITERS[Layout.long_rvos](tmp_path, split).dataset
    edit_json(expression_path(dataset), lambda content: first_expression(content).pop("type"))
    if split == "train":
        assert [e.group for e in read_expressions(dataset)][:2] == ["", "dynamic"]
    else:
        with pytest.raises(ValueError, match=r"valid0.*static or .* under 'type', found ''"):
            read_expressions(dataset)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    written = WRITERS[Layout.mevis](tmp_path, "train")
    path = tmp_path / "train/meta_expressions.json"
    path.write_text(path.read_text().replace('"1": {"exp"', '"0": {"exp"', 1))
    with pytest.raises(ValueError, match=r"meta_expressions.json is no JSON: key '0' stands twice"):
        read_expressions(written.dataset)


@pytest.mark.parametrize(
    ("layout", "file", "encodings"),
    [
        (Layout.mevis, "valid_u/meta_expressions.json", "utf-8"),
        (Layout.reason_seg, "val/val_0.json", "utf-8 or cp1252"),
    ],
)
def test_a_file_in_another_encoding_is_named(tmp_path: Path, layout: Layout, file: str, encodings: str) -> None:
    written = WRITERS[layout](tmp_path, file.split("/")[0])
    (tmp_path / file).write_bytes(b'{"\x81": 1}')  # in neither
    with pytest.raises(ValueError, match=rf"{file} is not text in {encodings}: "):
        read_expressions(written.dataset)


@pytest.mark.parametrize("video", ["../out", "/elsewhere/out", "a/../../out"])
def test_a_video_never_leads_out_of_the_folder_of_predictions(tmp_path: Path, video: str) -> None:
    written = WRITERS[Layout.mevis](tmp_path, "train")
    edit_json(
        tmp_path / "train/meta_expressions.json",
        lambda content: content["videos"].update({video: content["videos"].pop("train0")}),
    )
    with pytest.raises(ValueError, match=r"would be written to .*out/0, outside a folder of predictions"):
        read_expressions(written.dataset)


def test_two_expressions_never_share_a_folder_of_predictions(tmp_path: Path) -> None:
    written = WRITERS[Layout.mevis](tmp_path, "train")

    def collide(content: Any) -> None:
        expressions = content["videos"]["train0"]["expressions"]
        content["videos"]["train0/x"] = {**content["videos"]["train1"], "expressions": {"0": expressions["0"]}}
        expressions["x/0"] = expressions["1"]

    edit_json(tmp_path / "train/meta_expressions.json", collide)
    with pytest.raises(ValueError, match=r"train0/x/0 and mevis/train0/x/0 would both be written to train0/x/0"):
        read_expressions(written.dataset)


def test_valid_of_ref_youtube_vos_needs_a_way_to_tell_the_test_videos(tmp_path: Path) -> None:
    written = WRITERS[Layout.ref_youtube_vos_valid](tmp_path, "valid")
    (tmp_path / "meta_expressions/test/meta_expressions.json").unlink()

    def fill(content: Any) -> None:
        test = content["videos"].pop("test0")
        content["videos"] |= {f"test{number}": test for number in range(505)}

    edit_json(tmp_path / "meta_expressions/valid/meta_expressions.json", fill)
    with pytest.raises(ValueError, match=r"lists all 507 videos .* put the test file at .*/test/meta_expressions.json"):
        read_expressions(written.dataset)
    chosen = replace(written.dataset, videos="valid_videos.txt")
    with pytest.raises(FileNotFoundError, match=r"no list of videos .*valid_videos.txt; expected one id per line"):
        read_expressions(chosen)
    (tmp_path / "valid_videos.txt").write_text("valid1\nvalid0\n")
    check_reading(replace(written, dataset=chosen))
    (tmp_path / "valid_videos.txt").write_text("valid1\nvalid9\n")
    with pytest.raises(ValueError, match=r"valid_videos.txt names 1 videos that the split does not have, .*'valid9'"):
        read_expressions(chosen)


def test_valid_of_ref_youtube_vos_without_masks_can_be_predicted_only(tmp_path: Path) -> None:
    written = WRITERS[Layout.ref_youtube_vos_valid](tmp_path, "valid")
    shutil.rmtree(tmp_path / "valid/Annotations")
    expressions = read_expressions(written.dataset)
    assert len(expressions) == len(written.truth)
    with pytest.raises(ValueError, match=r"none of its 22 expressions has objects.*valid/Annotations"):
        require_annotations(written.dataset, expressions)


def test_training_pictures_of_refcoco_are_never_test_pictures_of_a_sibling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = WRITERS[Layout.refcoco](tmp_path / "refcoco", "train")
    with caplog.at_level(logging.WARNING):
        assert len(read_expressions(written.dataset)) == 8
    assert "refcoco+ is not there; its val and test pictures may be trained on" in caplog.text
    write_refcoco(tmp_path / "refcocog", "train", first_image=0)  # picture 2 is its first of val
    assert {e.video for e in read_expressions(written.dataset)} == {"COCO_train2014_000000000001"}


class Evil:
    """A pickle that would create a file if it were run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_asks_for_code_is_refused_and_not_run(tmp_path: Path) -> None:
    written = WRITERS[Layout.refcoco](tmp_path / "refcoco", "val")
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Evil(tmp_path / "touched")]))
    with pytest.raises(ValueError, match=r"refs\(unc\).p is not a pickle of plain data: it asks for pathlib\."):
        read_expressions(written.dataset)
    assert not (tmp_path / "touched").exists()


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """Protocol 0 with byte strings (S) and long integers (L), as Python 2 wrote it."""
    written = WRITERS[Layout.refcoco](tmp_path / "refcoco", "val")
    text = b"(lp0\n(dp1\nS'split'\np2\nS'val'\np3\nsS'ann_id'\np4\nL6L\nsS'image_id'\np5\nI3\nsS'sentences'\np6\n(lp7\n"
    text += b"(dp8\nS'sent'\np9\nS'the caf\\xe9'\np10\nsS'sent_id'\np11\nI12\nsasa."
    (tmp_path / "refcoco/refs(unc).p").write_bytes(text)
    [expression] = read_expressions(written.dataset)
    assert (expression.text, expression.exp_id, expression.object_ids) == ("the café", "12", (6,))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r[0].pop("split"), r"\[0\]: expected a str under 'split'"),
        (lambda r: r[4].update(ann_id="x"), r"\[4\]: expected a whole number under 'ann_id', found 'x'"),
        (lambda r: r[4].update(image_id=99), r"image_id 99 is not in .*instances.json"),
        (lambda r: r[4]["sentences"][0].pop("sent"), r"annotation 6: expected a str under 'sent'"),
        (lambda r: r[4].update(sentences=["a cat"]), r"annotation 6: expected a whole number under 'sent_id'"),
        (lambda r: r.__delitem__(slice(4, 8)), r"has no split 'val'; it has test, testA, testB, train"),
    ],
)
def test_a_malformed_refcoco_file_says_where(tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    written = WRITERS[Layout.refcoco](tmp_path / "refcoco", "val")
    file = tmp_path / "refcoco/refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    edit(refs)
    file.write_bytes(pickle.dumps(refs, protocol=2))
    with pytest.raises(ValueError, match=message):
        read_expressions(written.dataset)


@pytest.mark.parametrize(
    ("images", "message"),
    [({}, "expected a list under 'images', found dict"), ([7], "images: expected a whole number under 'id'")],
)
def test_malformed_pictures_of_refcoco_are_named(tmp_path: Path, images: Any, message: str) -> None:
    written = WRITERS[Layout.refcoco](tmp_path / "refcoco", "val")
    edit_json(tmp_path / "refcoco/instances.json", lambda content: content.update(images=images))
    with pytest.raises(ValueError, match=rf"instances\.json: .*{message}"):
        read_expressions(written.dataset)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("text"), r"val_0.json: expected a list under 'text'"),
        (lambda c: c.update(text=[]), r"val_0.json: expected sentences under 'text'"),
        (lambda c: c.update(is_sentence="yes"), r"expected a bool under 'is_sentence', found str"),
        (lambda c: c["shapes"][2].update(points=[]), r"shapes\[2\]: expected points \[x, y\], found \[\]"),
        (lambda c: c["shapes"][2].update(points=[[0, 0], [1]]), r"shapes\[2\]: expected points \[x, y\]"),
    ],
)
def test_a_malformed_file_of_reason_seg_is_named(tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    written = WRITERS[Layout.reason_seg](tmp_path, "val")
    edit_json(tmp_path / "val/val_0.json", edit)
    with pytest.raises(ValueError, match=message):
        read_expressions(written.dataset)
