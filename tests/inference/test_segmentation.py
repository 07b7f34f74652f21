"""glus.segment: anybody's video, from Python."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import glus
from glus.config import SettingsConfig
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.segmentation import sentence_folders
from tests.mounts import mount

TEXTS = ["the red circle", "a dog"]


class Noise:
    """A video of random frames, one of which may not be readable."""

    def __init__(self, num_frames: int = 4, unreadable: int | None = None):
        self.names = tuple(f"{index:05d}" for index in range(num_frames))
        self.unreadable = unreadable
        self.num_read = 0

    reads_in_parallel = False

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        self.num_read += 1
        if index == self.unreadable:
            raise ValueError(f"frame {self.names[index]} does not decode")
        return np.random.default_rng(index).integers(0, 256, (30, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> VideoPredictor:
    return load_predictor(model_folder)[0]


def test_masks_come_with_areas_and_scores(predictor: VideoPredictor):
    video = Noise()
    segmentation = glus.segment(video, TEXTS, predictor)
    assert [frame.name for frame in segmentation.frames] == list(video.names)
    for frame, result in zip(segmentation.frames, predictor.segment(video, TEXTS), strict=True):
        np.testing.assert_array_equal(frame.masks(), result.masks_RHW)
        np.testing.assert_allclose(frame.areas, result.masks_RHW.mean((1, 2)), atol=1e-6)
        np.testing.assert_allclose(frame.scores, result.scores_R, atol=1e-6)


def test_output_holds_masks_movie_and_summary(predictor: VideoPredictor, tmp_path: Path):
    out = tmp_path / "out"
    segmentation = glus.segment(Noise(), TEXTS, predictor, out, frames_per_second=5)
    assert {path.name for path in out.iterdir()} == {"a-dog", "overlay.mp4", "segmentation.json", "the-red-circle"}
    for number, name in enumerate(("the-red-circle", "a-dog")):
        files = sorted(path.name for path in (out / name).iterdir())
        assert files == [*(f"{frame.name}.png" for frame in segmentation.frames), "answers.json"]
        for frame in segmentation.frames:
            mask = np.array(Image.open(out / name / f"{frame.name}.png"))
            np.testing.assert_array_equal(mask, frame.masks()[number] * np.uint8(255))
    meta = next(imageio_ffmpeg.read_frames(str(out / "overlay.mp4")))
    assert (meta["fps"], meta["duration"]) == (5, 0.8)


def test_a_part_of_a_video_is_a_video_whose_frames_keep_their_names(predictor: VideoPredictor, tmp_path: Path):
    whole = Noise(12)
    found = glus.segment(whole, TEXTS, predictor, tmp_path / "out", frames=slice(3, 10, 3))
    assert [frame.name for frame in found.frames] == ["00003", "00006", "00009"]
    assert sorted(path.stem for path in (tmp_path / "out" / "a-dog").glob("*.png")) == ["00003", "00006", "00009"]
    alone = glus.segment([whole.read(number) for number in (3, 6, 9)], TEXTS, predictor)
    assert [frame.codes for frame in found.frames] == [frame.codes for frame in alone.frames]
    streamed = list(glus.stream(whole, TEXTS, predictor, frames=slice(3, 10, 3)))
    assert streamed == found.frames
    np.testing.assert_array_equal(found.overlay(1).shape, (30, 50, 3))
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "out" / "overlay.mp4")))
    assert (meta["fps"], meta["duration"]) == (8, 0.38)  # a third of 24: as long as the nine frames


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (slice(4, None), r"no frame from 4 to before 4: the video has frames 0 to 3"),
        (slice(2, 2), r"no frame from 2 to before 2"),
        (slice(0, None, 0), r"every 0. frame: expected 1 \(all\) or more"),
        (slice(None, None, -1), r"every -1. frame"),
    ],
)
def test_a_part_without_frames_is_refused(predictor: VideoPredictor, frames: slice, message: str):
    with pytest.raises(ValueError, match=message):
        glus.segment(Noise(4), TEXTS, predictor, frames=frames)


def test_sentences_start_from_their_key_frames(
    predictor: VideoPredictor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.INFO)
    video = Noise(6)
    expected: dict[int, dict[int, np.ndarray]] = {frame: {} for frame in range(6)}
    for result in predictor.segment(video, TEXTS, [2, 4]):
        expected[result.frame] |= dict(zip(result.rows, result.masks_RHW, strict=True))
    found = glus.segment(video, TEXTS, predictor, key_frames=[2, 4])
    assert [frame.name for frame in found.frames] == list(video.names)
    for number, frame in enumerate(found.frames):
        np.testing.assert_array_equal(frame.masks(), np.stack([expected[number][row] for row in (0, 1)]))
    assert re.search(r"frames: 6, sentences: 2, device: .+ s, .+ frames/s, peak memory [\d.]+ GiB", caplog.text)

    odd = slice(1, None, 2)
    part = glus.segment(Noise(12), TEXTS, predictor, frames=odd, key_frames=[5, 9])  # numbers of the whole video
    alone = glus.segment([Noise.read(video, n) for n in range(1, 12, 2)], TEXTS, predictor, key_frames=[2, 4])
    assert [frame.codes for frame in part.frames] == [frame.codes for frame in alone.frames]

    monkeypatch.setattr(VideoPredictor, "score_frames", lambda *_: np.eye(6)[[2, 4]])
    assert glus.segment(video, TEXTS, predictor, key_frames="auto").frames == found.frames
    assert "key frames: 00002, 00004" in caplog.text


@pytest.mark.parametrize(
    ("key_frames", "message"),
    [
        ([1], r"1 key frames for 2 sentences: expected one each, or auto"),
        ([1, 2], r"key frame 2: the frames looked at are 1 to 5, every 2\."),
        ([1, 7], r"key frame 7: the frames looked at are 1 to 5"),
    ],
)
def test_key_frames_that_are_not_looked_at_are_refused(key_frames: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        glus.segment(Noise(7), TEXTS, "no model is looked for", frames=slice(1, 7, 2), key_frames=key_frames)


def test_one_frame_is_a_video(predictor: VideoPredictor, tmp_path: Path):
    assert len(glus.segment(Noise(1), TEXTS, predictor, tmp_path / "out").frames) == 1


@pytest.mark.parametrize(
    ("video", "texts", "message"),
    [
        (Noise(), ["a cat", " . "], "sentence 2 of 2 is empty"),
        (Noise(), ["a cat", "\u00a0\u200b\t"], "sentence 2 of 2 is empty"),
        (Noise(), ["a cat", "a \ud83d dog"], r"sentence 2 of 2 is no text .* 'a \\ud83d dog'"),
        (Noise(), ["a\udcff"], "sentence 1 of 1 is no text"),
        (Noise(), [], "no sentence"),
        (Noise(), "a cat", "expected a list"),
        (Noise(), ["a cat", "a very long story " * 112], r"sentence 2: .* 2015 characters .* at most 1024"),
        (Noise(0), TEXTS, "0 frames"),
        (Noise(9, unreadable=5), TEXTS, "frame 00005 does not decode"),
    ],
)
def test_what_cannot_be_segmented_is_named_and_leaves_nothing(
    video: Noise, texts: list[str], message: str, predictor: VideoPredictor, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        glus.segment(video, texts, predictor, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_settings_are_not_ignored(predictor: VideoPredictor):
    with pytest.raises(ValueError, match=r"give them to glus\.load"):
        glus.segment(Noise(1), TEXTS, predictor, settings=SettingsConfig(memory_stride=1))


@pytest.mark.parametrize("rate", [0, -5, float("nan"), float("inf"), 1e-9, 1e9])
def test_a_movie_needs_a_rate(rate: float, predictor: VideoPredictor, tmp_path: Path):
    video = Noise(1)
    with pytest.raises(ValueError, match="frames per second: expected more than 0"):
        glus.segment(video, TEXTS, predictor, tmp_path / "out", frames_per_second=rate)
    assert (list(tmp_path.iterdir()), video.num_read) == ([], 0)


@pytest.mark.parametrize("rate", [0.01, 1000])
def test_the_slowest_and_the_fastest_movie_are_written(rate: float, predictor: VideoPredictor, tmp_path: Path):
    glus.segment(Noise(2), TEXTS[:1], predictor, tmp_path / "out", frames_per_second=rate)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "out" / "overlay.mp4")))
    assert meta["duration"] == pytest.approx(2 / rate, abs=0.01)


def no_ffmpeg() -> str:
    raise RuntimeError("No ffmpeg exe could be found.")


@pytest.mark.parametrize("ffmpeg", [no_ffmpeg, lambda: "/nowhere/ffmpeg", lambda: "false", lambda: __file__])
def test_want_of_ffmpeg_shows_before_the_first_frame(ffmpeg, predictor, tmp_path: Path, monkeypatch):
    """There is none, it is not where it should be, it cannot encode, it is for another processor."""
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", ffmpeg)
    video = Noise()
    with pytest.raises(OSError, match=r"no movie can be written: .*; .*IMAGEIO_FFMPEG_EXE"):
        glus.segment(video, TEXTS, predictor, tmp_path / "out")
    assert (list(tmp_path.iterdir()), video.num_read) == ([], 0)


def test_a_movie_that_fails_costs_no_masks(predictor: VideoPredictor, tmp_path: Path, monkeypatch):
    encodes = iter([imageio_ffmpeg.get_ffmpeg_exe(), "false"])
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: next(encodes))
    out = tmp_path / "out"
    with pytest.raises(OSError, match=rf"ffmpeg exit 1.*; the masks and segmentation.json are complete in {out}$"):
        glus.segment(Noise(), TEXTS, predictor, out)
    assert sorted(path.name for path in out.iterdir()) == ["a-dog", "segmentation.json", "the-red-circle"]
    assert len(list(out.glob("*/*.png"))) == 8


def test_want_of_room_shows_before_the_first_frame(predictor: VideoPredictor, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**14))
    video = Noise(5)
    with pytest.raises(OSError, match=r"has 0.0 MiB free, but 5 files take at least 0.0: make room"):
        glus.segment(video, TEXTS[:1], predictor, tmp_path / "out")
    assert (list(tmp_path.iterdir()), video.num_read) == ([], 0)
    glus.segment(Noise(4), TEXTS[:1], predictor, tmp_path / "out")


@pytest.mark.parametrize("is_link", [False, True])
def test_output_may_be_a_mount_point_or_a_link(is_link: bool, predictor: VideoPredictor, tmp_path: Path, monkeypatch):
    (tmp_path / "there").mkdir()
    out = tmp_path / ("link" if is_link else "there")
    if is_link:
        out.symlink_to("there")
    else:
        mount(out, monkeypatch)
    for texts in (TEXTS, TEXTS[1:]):
        glus.segment(Noise(1), texts, predictor, out, overwrite=texts != TEXTS)
    with pytest.raises(ValueError, match="does not decode"):
        glus.segment(Noise(3, unreadable=2), TEXTS, predictor, out, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a-dog", "overlay.mp4", "segmentation.json"]


def test_a_result_that_cannot_be_put_in_its_place_is_not_lost(predictor: VideoPredictor, tmp_path: Path, monkeypatch):
    out, replace = tmp_path / "out", os.rename
    glus.segment(Noise(1), TEXTS[:1], predictor, out)

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == "a-dog":
            raise OSError(errno.EIO, "Input/output error", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="cannot write") as error:
        glus.segment(Noise(1), TEXTS[1:], predictor, out, overwrite=True)
    finished = Path(str(error.value).rpartition(" lies in ")[2])
    assert (finished / "a-dog/00000.png").is_file()
    assert sorted(path.name for path in out.iterdir()) == ["overlay.mp4", "segmentation.json", "the-red-circle"]


def test_a_sentence_of_the_longest_length_that_a_message_allows_is_read(predictor: VideoPredictor):
    with pytest.raises(ValueError, match="shorten") as error:
        glus.segment(Noise(1), ["circle " * 3000], predictor)
    characters = int(str(error.value).rsplit("to about ", 1)[1].split()[0])
    assert glus.segment(Noise(3), ["circle " * (characters // len("circle "))], predictor).frames


def test_a_full_disk_leaves_nothing(predictor: VideoPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_room(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OSError, match=r"cannot write .*00000.png: No space left on device .* MiB free") as error:
        glus.segment(Noise(), TEXTS, predictor, tmp_path / "out")
    assert "is kept" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_result_is_replaced_and_only_when_told(predictor: VideoPredictor, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    glus.segment(Noise(1), TEXTS, predictor, out)
    with pytest.raises(ValueError, match="add --overwrite"):
        glus.segment(Noise(1), TEXTS, predictor, out)
    glus.segment(Noise(1), TEXTS[1:], predictor, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["a-dog", "overlay.mp4", "segmentation.json"]
    with pytest.raises(ValueError, match=r"a-dog holds files, and no segmentation.json"):
        glus.segment(Noise(1), TEXTS, predictor, out / "a-dog", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        glus.segment(Noise(1), TEXTS, predictor, out / "segmentation.json", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / ".DS_Store").touch()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds notes.txt besides the result .*, and --overwrite would delete it"):
        glus.segment(Noise(1), TEXTS, predictor, out, overwrite=True)
    (out / "notes.txt").unlink()
    glus.segment(Noise(1), TEXTS, predictor, out, overwrite=True)


def test_sentences_become_folder_names():
    assert sentence_folders(["The red car!", "the red car", "猫", "?", "!"]) == [
        "the-red-car", "the-red-car-2", "猫", "sentence-4", "sentence-5",
    ]  # fmt: skip
    assert sentence_folders(["car 3", "car", "car"]) == ["car-3", "car", "car-4"]


def test_white_space_in_a_sentence_is_made_even(predictor: VideoPredictor):
    plain = glus.segment(Noise(), ["the red circle"], predictor)
    odd = [
        "the\tred\u00a0circle",
        " the  red\r\ncircle\n",
        "the\u2009red\u3000cir\u00adcle\ufeff",
        "the\u2028red\u200b circle",
    ]
    copied = glus.segment(Noise(), odd, predictor)
    assert copied.texts == ("the red circle",) * len(odd)
    for one, other in zip(plain.frames, copied.frames, strict=True):
        assert other.codes == one.codes * len(odd)


def test_a_video_may_be_anything_that_holds_frames(predictor: VideoPredictor, tmp_path: Path):
    """B7."""
    frames = np.stack([Noise().read(index) for index in range(3)])
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    wanted = [frame.codes for frame in glus.segment(Noise(3), TEXTS, predictor).frames]
    forms = {
        "array": frames,
        "channels first": torch.from_numpy(frames).permute(0, 3, 1, 2),
        "list of arrays": list(frames),
        "list of pictures": [Image.fromarray(frame) for frame in frames],
        "list of paths": [str(path) for path in paths],
        "mixed": [paths[0], frames[1], torch.from_numpy(frames[2])],
    }
    for name, video in forms.items():
        assert [frame.codes for frame in glus.segment(video, TEXTS, predictor).frames] == wanted, name
    for one in (frames[0], torch.from_numpy(frames[0]), Image.fromarray(frames[0]), paths[0], str(paths[0])):
        assert len(glus.segment(one, TEXTS, predictor).frames) == 1


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((2, 4, 5, 3), np.float32), r"frame 0 is float32 of shape \(4, 5, 3\); expected uint8 RGB"),
        (np.zeros((2, 4, 5), np.uint8), r"frame 0 is uint8 of shape \(2, 4, 5\)"),
        ([np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)], r"frame 1 is uint8 of shape \(4, 5\)"),
        (5, r"a video of type int: expected a path, an array"),
        ([], r"0 frames"),
    ],
)
def test_what_holds_no_frames_is_named(video: object, message: str, predictor: VideoPredictor):
    with pytest.raises(ValueError, match=message):
        glus.segment(video, TEXTS, predictor)


def test_frames_stream_as_they_come(predictor: VideoPredictor):
    video = Noise(90)
    stream = glus.stream(video, TEXTS, predictor)
    first = next(stream)
    assert video.num_read < 90
    assert [first, *stream] == glus.segment(Noise(90), TEXTS, predictor).frames


def test_a_model_is_loaded_once(predictor: VideoPredictor, model_folder: Path):
    loaded = glus.load(model_folder)
    assert glus.load(loaded) is loaded
    assert glus.segment(Noise(), TEXTS, loaded).frames == glus.segment(Noise(), TEXTS, predictor).frames
    with pytest.raises(ValueError, match=r"give them to glus\.load"):
        glus.load(loaded, SettingsConfig(memory_stride=1))
    assert {"load", "segment", "stream"} <= set(dir(glus))


def test_a_segmentation_is_looked_at_and_converted(predictor: VideoPredictor, tmp_path: Path, monkeypatch):
    found = glus.segment(Noise(), TEXTS, predictor, settings=None)
    assert repr(found) == "Segmentation(2 sentences, 4 frames of 50x30)"
    assert found._repr_html_().startswith('<img src="data:image/png;base64,')
    assert found.overlay(1).shape == (30, 50, 3)
    assert found.masks("a dog").shape == (4, 30, 50)
    np.testing.assert_array_equal(found.masks(1)[2], found.frames[2].masks()[1])
    with pytest.raises(ValueError, match=r"no sentence 'a cat'; there are \['the red circle', 'a dog'\]"):
        found.masks("a cat")
    with pytest.raises(ValueError, match="no sentence number 2"):
        found.masks(2)
    coco = found.to_coco()
    masks = {(a["image_id"], a["category_id"] - 1): a for a in coco["annotations"]}
    assert len(coco["images"]) == 4
    for frame, answers in enumerate(found.frames):
        for row, mask in enumerate(answers.masks()):
            assert ((frame, row) in masks) == bool(mask.any())
            if mask.any():
                code = {**masks[frame, row]["segmentation"], "counts": masks[frame, row]["segmentation"]["counts"]}
                np.testing.assert_array_equal(coco_mask.decode(code), mask)
                x, y, width, height = masks[frame, row]["bbox"]
                assert mask[y : y + height, x : x + width].sum() == mask.sum() == masks[frame, row]["area"]
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **given: given))
    detections = found.to_supervision(0)
    np.testing.assert_array_equal(detections["mask"], found.frames[0].masks()[detections["class_id"]])
    assert detections["xyxy"].shape == (len(detections["class_id"]), 4)
    found.save(tmp_path / "out", frames_per_second=5)
    glus.segment(Noise(), TEXTS, predictor, tmp_path / "same", frames_per_second=5)
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")}
    assert written
    for path in written:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "same" / path).read_bytes()
    with pytest.raises(ValueError, match="holds the result of an earlier run"):
        found.save(tmp_path / "out")


def test_frames_of_several_sizes_are_looked_at(predictor: VideoPredictor):
    frames = [Noise().read(0), Noise().read(1).transpose(1, 0, 2), Noise().read(2)]
    found = glus.segment(frames, TEXTS, predictor)
    assert found._repr_html_().startswith('<img src="data:image/png;base64,')
    with pytest.raises(ValueError, match="frames of 2 sizes have no common array"):
        found.masks(0)
