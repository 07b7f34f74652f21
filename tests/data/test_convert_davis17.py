"""The conversion of DAVIS 2017 and its sentences, from a small download to what the reader reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.index import open_masks, read_expressions
from tests.layouts import SIZE, make_video
from tests.layouts.davis17 import davis_ids, davis_sentence, write_davis_download
from tools import convert_davis17


@pytest.fixture
def download(tmp_path: Path) -> Path:
    write_davis_download(tmp_path / "downloads")
    return tmp_path / "downloads"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dataset(root: Path, split: str) -> DatasetConfig:
    return DatasetConfig(name="ref_davis17", layout=Layout.ref_davis17, root=str(root), split=split)


@pytest.mark.parametrize("flags", [[], ["--link"]])
def test_what_was_downloaded_is_converted_and_left_alone(
    download: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = files(download), tmp_path / "out"
    convert_davis17.main([str(download), str(out), *flags])
    assert files(download) == before
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["videos", "objects", "sentences", "frames"],
        ["train", "1", "3", "12", "5"],
        ["valid", "2", "6", "24", "10"],
    ]
    for split, videos in (("train", ["classic-car"]), ("valid", ["bear", "dogs-scale"])):
        expressions = read_expressions(dataset(out, split))
        assert [(e.video, e.exp_id) for e in expressions] == [(v, str(n)) for v in videos for n in range(12)]
        for expression in expressions:
            object_id, annotator = int(expression.exp_id) // 4 + 1, int(expression.exp_id) % 4
            spelt = {"classic-car": "clasic-car", "dogs-scale": "dog-scale"}.get(expression.video, expression.video)
            assert expression.text == davis_sentence(spelt, object_id, annotator)
            assert expression.object_ids == (object_id,)
    ids, _ = davis_ids(make_video("bear", 120))
    masks = open_masks(dataset(out, "valid")).read(read_expressions(dataset(out, "valid"))[4], range(5), SIZE)
    np.testing.assert_array_equal(masks, ids == 2)
    copy = out / "valid/JPEGImages/bear/00000.jpg"
    assert copy.samefile(download / "DAVIS/JPEGImages/480p/bear/00000.jpg") == bool(flags)


def test_an_interrupted_conversion_is_finished(download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    convert_davis17.main([str(download), str(whole)])
    copied = []

    def copy_until_full(source: Path, target: Path) -> None:
        if len(copied) == 23:
            raise OSError("disk full")
        copied.append(target.write_bytes(source.read_bytes()))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", copy_until_full)
        with pytest.raises(SystemExit, match="disk full"):
            convert_davis17.main([str(download), str(broken)])
    assert not (broken / "meta_expressions/valid").exists()
    videos = [video for kind in ("JPEGImages", "Annotations") for video in broken.glob(f"*/{kind}/[!.]*")]
    assert [len(list(video.iterdir())) for video in videos] == [5] * 4
    convert_davis17.main([str(download), str(broken)])
    assert files(broken) == files(whole)


def replace_line(file: str, number: int, line: bytes) -> Callable[[Path], None]:
    def damage(download: Path) -> None:
        path = download / "davis_text_annotations" / file
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number - 1] = line
        path.write_bytes(b"".join(lines))

    return damage


@pytest.mark.parametrize(
    "line", ["bear 1 “a fiancée”".encode(), 'bear 1 "a fiancée"'.encode(), b'bear 1 "a fianc\xe9e"']
)
def test_sentences_are_in_utf_8_or_in_latin_1(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "Davis17_annot2.txt").write_bytes(line)
    assert convert_davis17.read_sentences(tmp_path / "Davis17_annot2.txt") == {("bear", 1): "a fiancée"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_line("Davis17_annot1.txt", 3, b"bear one\n"), r"Davis17_annot1.txt:3: expected <video> <object id>"),
        (replace_line("Davis17_annot1.txt", 3, b"bear 1 a dog\n"), r"Davis17_annot1.txt:3: expected .*<sentence>"),
        (
            replace_line("Davis17_annot2.txt", 1, b'bear 1 "a"\n'),
            r"annot2.txt:5: a second sentence about object 1 of b",
        ),
        (replace_line("Davis17_annot2.txt", 2, b""), r"Davis17_annot2.txt says nothing about object 2 of bear"),
        (lambda d: (d / "davis_text_annotations/Davis17_annot1.txt").unlink(), r"expected .*Davis17_annot1.txt"),
        (lambda d: (d / "DAVIS/ImageSets/2017/val.txt").unlink(), r"val.txt is missing; unzip DAVIS-2017-Unsup"),
        (lambda d: (d / "DAVIS/ImageSets/2017/val.txt").write_text("cow"), r"480p/cow holds no \*.jpg"),
        (
            lambda d: (d / "DAVIS/Annotations_unsupervised/480p/bear/00003.png").unlink(),
            r"bear: .* differ in frame 00003",
        ),
    ],
)
def test_a_defect_of_the_download_is_named_and_nothing_written(
    download: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(download)
    with pytest.raises(SystemExit, match=message):
        convert_davis17.main([str(download), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_conversion_is_not_taken_for_complete(download: Path, tmp_path: Path) -> None:
    convert_davis17.main([str(download), str(tmp_path / "out")])
    (tmp_path / "out/train/JPEGImages/classic-car/00002.jpg").unlink()
    with pytest.raises(SystemExit, match=r"classic-car holds other files than .*; remove it and run this again"):
        convert_davis17.main([str(download), str(tmp_path / "out")])
