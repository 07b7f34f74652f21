"""Shapes: the promises of its sentences, checked on the masks, and its files, read without the project's loaders."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from glus.shapes.render import COLOURS, SHAPES
from glus.shapes.scene import DIRECTIONS, KINDS, STRUCTURES, Scene, Sentence, generate_scene, scene_of
from glus.shapes.write import LAYOUT_KINDS, SHEET_ROWS, count_kinds, draw_contact_sheet, write_shapes

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import make_shapes

FORMATS = ((16, 128, 90), (8, 96, 50), (24, 64, 30), (6, 48, 30))
"""Frames, side, number of scenes."""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene_of(3, "train", index, frames, size) for frames, size, count in FORMATS for index in range(count)]


def pairs(scenes: list[Scene], structure: str) -> list[tuple[Scene, list[Sentence]]]:
    """Scenes of a structure with its two sentences."""
    kind = next(kind for kind, structures in STRUCTURES.items() if structure in structures)
    found = [(s, [sentence for sentence in s.sentences if sentence.kind == kind]) for s in scenes]
    found = [(scene, pair) for scene, pair in found if scene.structure == structure]
    assert len(found) > 10
    assert all(len(pair) == 2 for _, pair in found)
    return found


def visible(scene: Scene, sentence: Sentence) -> np.ndarray:
    """(T,) bool: whether the one object of the sentence can be seen."""
    (number,) = sentence.object_ids
    return scene.masks_OTHW[number].any(axis=(1, 2))


def centres(scene: Scene, sentence: Sentence) -> np.ndarray:
    """(T, 2): mean (x, y) of the visible pixels of the one object of the sentence."""
    (number,) = sentence.object_ids
    return np.array([np.argwhere(mask)[:, ::-1].mean(0) for mask in scene.masks_OTHW[number]])


def test_scene_has_the_promised_arrays(scenes: list[Scene]) -> None:
    first = scenes[0]
    assert first.frames_THW3.shape == (16, 128, 128, 3)
    assert first.frames_THW3.dtype == np.uint8
    assert first.masks_OTHW.shape == (len(first.objects), 16, 128, 128)
    assert first.masks_OTHW.dtype == bool
    for scene in scenes:
        assert len(scene.objects) in (3, 4)
        assert [item.object_id for item in scene.objects] == list(range(len(scene.objects)))
        assert scene.masks_OTHW.sum(0).max() == 1, "visible pixels of two objects never overlap"
        assert scene.masks_OTHW[:, 0].any(axis=(1, 2)).all(), "every object is there at the start"


def test_same_seed_same_scene_other_split_other_scene() -> None:
    one, again = scene_of(0, "train", 5), scene_of(0, "train", 5)
    assert one.sentences == again.sentences
    assert np.array_equal(one.frames_THW3, again.frames_THW3)
    assert np.array_equal(one.masks_OTHW, again.masks_OTHW)
    for other in (scene_of(0, "valid", 5), scene_of(0, "train", 6), scene_of(1, "train", 5)):
        assert not np.array_equal(one.frames_THW3, other.frames_THW3)


def test_masks_lie_on_the_colour_of_their_object(scenes: list[Scene]) -> None:
    for scene in scenes[:30]:
        for item in scene.objects:
            pixels = scene.frames_THW3[0][scene.masks_OTHW[item.object_id, 0]].astype(float)
            median = np.median(pixels / pixels.max(1, keepdims=True), axis=0)
            hues = {name: np.asarray(rgb) / max(rgb) for name, rgb in COLOURS.items()}
            assert min(hues, key=lambda name: np.abs(hues[name] - median).sum()) == item.colour


def test_every_video_has_its_sentences(scenes: list[Scene]) -> None:
    for scene in scenes:
        kinds = [sentence.kind for sentence in scene.sentences]
        of_structure = next(kind for kind, structures in STRUCTURES.items() if scene.structure in structures)
        assert 6 <= len(kinds) <= 8
        assert set(kinds) <= set(KINDS)
        assert kinds.count("absent") == 1
        assert kinds.count("multi") in (1, 2)
        assert kinds.count("appearance") >= 1
        assert kinds.count(of_structure) == 2
        texts = [sentence.text for sentence in scene.sentences]
        assert len(set(texts)) == len(texts)
        assert all(text.split()[0] in ("the", "all") and not text.endswith(".") for text in texts)
        alone = {sentence.object_ids for sentence in scene.sentences}
        assert all((item.object_id,) in alone for item in scene.objects), "every object is named alone"


def test_every_sentence_has_a_counterpart_about_other_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        for sentence in scene.sentences:
            mine = set(sentence.object_ids)
            assert any(s.object_ids and not mine & set(s.object_ids) for s in scene.sentences), sentence


def fitting(scene: Scene, text: str) -> tuple[int, ...]:
    """Objects that have every colour and shape that the text names, in the singular or plural."""
    words = {word.rstrip("s") for word in text.split()}
    colours, shapes = words & set(COLOURS), words & set(SHAPES)
    return tuple(
        item.object_id
        for item in scene.objects
        if (not colours or item.colour in colours) and (not shapes or item.shape in shapes)
    )


def test_looks_fit_the_named_objects_and_no_other(scenes: list[Scene]) -> None:
    for scene in scenes:
        for sentence in scene.sentences:
            if sentence.kind in ("appearance", "multi", "absent"):
                assert fitting(scene, sentence.text) == sentence.object_ids, sentence
            else:
                assert len(fitting(scene, sentence.text)) == 2, "only motion tells the look-alikes apart"
                assert set(sentence.object_ids) < set(fitting(scene, sentence.text))


def test_absent_sentences_are_hard(scenes: list[Scene]) -> None:
    for scene in scenes:
        (absent,) = (sentence for sentence in scene.sentences if sentence.kind == "absent")
        words = set(absent.text.split())
        assert words & ({item.colour for item in scene.objects} | {item.shape for item in scene.objects})


def test_named_direction_fits_one_object(scenes: list[Scene]) -> None:
    for scene, pair in pairs(scenes, "opposite"):
        for sentence, other in (pair, pair[::-1]):
            direction = np.asarray(DIRECTIONS[sentence.text.split()[-1]])
            size = scene.frames_THW3.shape[1]
            mine, theirs = (scene.objects[s.object_ids[0]].path_T2 for s in (sentence, other))
            assert (mine[-1] - mine[0]) @ direction > 0.39 * size
            assert (theirs[-1] - theirs[0]) @ direction < 0.01 * size


def test_direction_shows_in_the_masks(scenes: list[Scene]) -> None:
    for scene, pair in pairs(scenes, "opposite"):
        for sentence in pair:
            seen = centres(scene, sentence)
            travelled = (seen[-1] - seen[0]) @ np.asarray(DIRECTIONS[sentence.text.split()[-1]])
            assert travelled > 0.25 * scene.frames_THW3.shape[1]


def test_position_does_not_tell_the_direction() -> None:
    """At mid-video the centres of left- and right-moving objects are spread alike around the middle."""
    found: dict[str, list[float]] = {way: [] for way in DIRECTIONS}
    for index in range(150):
        scene = scene_of(11, "train", index, 6, 48)
        for sentence in scene.sentences:
            if sentence.kind == "motion":
                way = sentence.text.split()[-1]
                path = scene.objects[sentence.object_ids[0]].path_T2
                found[way].append(float((path[2:4].mean(0) / 48 - 0.5) @ np.abs(DIRECTIONS[way])))
    assert all(len(values) > 10 and abs(np.mean(values)) < 0.05 for values in found.values())


def test_first_to_leave_is_gone_while_the_other_stays(scenes: list[Scene]) -> None:
    stays_to_the_end = 0
    for scene, pair in pairs(scenes, "leave"):
        first, other = sorted(pair, key=lambda sentence: "first" not in sentence.text)
        assert "first" in first.text
        assert "longer" in other.text
        num_frames = len(scene.frames_THW3)
        gone = int(np.argmin(visible(scene, first)))
        assert 0.45 * num_frames <= gone <= 0.7 * num_frames
        assert visible(scene, first)[:gone].all()
        assert not visible(scene, first)[gone:].any()
        seen = visible(scene, other)
        left = num_frames if seen.all() else int(np.argmin(seen))
        assert left - gone >= 0.12 * num_frames
        assert not seen[left:].any()
        stays_to_the_end += left == num_frames
    assert stays_to_the_end > 3


def test_one_turns_around_and_the_other_keeps_going(scenes: list[Scene]) -> None:
    for scene, pair in pairs(scenes, "turn"):
        turning, going = sorted(pair, key=lambda sentence: "later" not in sentence.text)
        size, num_frames = scene.frames_THW3.shape[1], len(scene.frames_THW3)
        turner, goer = (scene.objects[sentence.object_ids[0]].path_T2 for sentence in (turning, going))
        direction = (goer[-1] - goer[0]) / np.linalg.norm(goer[-1] - goer[0])
        forward, straight = turner @ direction, goer @ direction
        turn = int(np.argmax(forward))
        assert 0.35 * (num_frames - 1) <= turn <= 0.65 * (num_frames - 1)
        assert (np.diff(straight) > 0).all()
        assert np.ptp(straight) > 0.55 * size
        assert forward[turn] - forward[0] > 0.2 * size
        assert forward[turn] - forward[-1] > 0.2 * size
        early = slice(0, max(2, int(0.4 * num_frames)))
        assert np.allclose(np.diff(forward[early]), np.diff(straight[early])), "alike until the turn"


def test_look_alikes_cross_and_stay_partly_visible(scenes: list[Scene]) -> None:
    places = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    for scene, pair in pairs(scenes, "cross"):
        size = scene.frames_THW3.shape[1]
        one, other = (scene.objects[sentence.object_ids[0]] for sentence in pair)
        assert (one.shape, one.rgb, one.texture, one.radius) == (other.shape, other.rgb, other.texture, other.radius)
        for sentence, mine, theirs in ((pair[0], one, other), (pair[1], other, one)):
            axis, sign = places[sentence.text.split()[-1]]
            gap = sign * (mine.path_T2 - theirs.path_T2)[:, axis]
            assert gap[0] > 0.4 * size
            assert gap[-1] < -0.4 * size
            crossing = int(np.argmin(np.abs(gap)))
            assert 0.3 * len(gap) <= crossing <= 0.7 * len(gap)
        areas = scene.masks_OTHW.sum(axis=(2, 3))
        for item in (one, other):
            assert areas[item.object_id].min() > 0.15 * areas[item.object_id].max()


def test_objects_are_not_hidden(scenes: list[Scene]) -> None:
    """Wherever an object's centre lies in the frame, a good part of the object is seen."""
    for scene in scenes:
        size = scene.frames_THW3.shape[1]
        for item in scene.objects:
            is_inside = ((item.path_T2 > 0) & (item.path_T2 < size)).all(1)
            areas = scene.masks_OTHW[item.object_id].sum(axis=(1, 2))[is_inside]
            assert areas.min() > 0.15 * np.pi * item.radius**2


def test_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="num_frames=3"):
        generate_scene(np.random.default_rng(0), num_frames=3)
    with pytest.raises(ValueError, match="size=8"):
        generate_scene(np.random.default_rng(0), size=8)
    with pytest.raises(ValueError, match="'tset'"):
        scene_of(0, "tset", 0)


def test_an_unknown_split_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tset'"):
        write_shapes(tmp_path / "shapes", "tset", 2, num_frames=6, size=48)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ files


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_mevis_layout(tmp_path: Path) -> None:
    assert write_shapes(tmp_path, "train", 3, seed=7, num_frames=8, size=64)
    root = tmp_path / "train"
    videos = load(root / "meta_expressions.json")["videos"]
    masks, kinds = load(root / "mask_dict.json"), load(root / "kinds.json")
    assert list(videos) == list(kinds)
    assert [entry["vid_id"] for entry in videos.values()] == [0, 1, 2]
    assert list(masks) == [str(number) for number in range(len(masks))], "annotation ids are global over the split"
    for index, (video, entry) in enumerate(videos.items()):
        scene = scene_of(7, "train", index, 8, 64)
        assert entry["frames"] == [f"{t:05d}" for t in range(8)]
        frame = np.asarray(Image.open(root / "JPEGImages" / video / "00003.jpg"))
        assert np.abs(frame.astype(int) - scene.frames_THW3[3]).mean() < 6
        assert list(entry["expressions"]) == [str(number) for number in range(len(scene.sentences))]
        for exp_id, sentence in zip(entry["expressions"], scene.sentences, strict=True):
            value = entry["expressions"][exp_id]
            assert (value["exp"], value["obj_id"]) == (sentence.text, list(sentence.object_ids))
            assert kinds[video][exp_id] == sentence.kind
            assert len(value["anno_id"]) == len(value["obj_id"])
            for object_id, anno_id in zip(value["obj_id"], value["anno_id"], strict=True):
                for code, mask in zip(masks[str(anno_id)], scene.masks_OTHW[object_id], strict=True):
                    assert (code is None) == (not mask.any())
                    assert code is None or np.array_equal(rle.decode(code), mask)


def test_youtube_layout(tmp_path: Path) -> None:
    assert write_shapes(tmp_path, "valid", 3, seed=7, num_frames=8, size=64, layout="ref_youtube_vos")
    videos = load(tmp_path / "meta_expressions/valid/meta_expressions.json")["videos"]
    objects, kinds = load(tmp_path / "valid/meta.json")["videos"], load(tmp_path / "valid/kinds.json")
    assert list(videos) == list(objects) == list(kinds)
    for index, (video, entry) in enumerate(videos.items()):
        scene = scene_of(7, "valid", index, 8, 64)
        assert entry["frames"] == [f"{5 * t:05d}" for t in range(8)]
        for t, name in enumerate(entry["frames"]):
            assert (tmp_path / "valid/JPEGImages" / video / f"{name}.jpg").is_file()
            image = Image.open(tmp_path / "valid/Annotations" / video / f"{name}.png")
            assert image.mode == "P"
            for number, mask in enumerate(scene.masks_OTHW, start=1):
                assert np.array_equal(np.asarray(image) == number, mask[t])
                assert (name in objects[video]["objects"][str(number)]["frames"]) == bool(mask[t].any())
        single = [s for s in scene.sentences if s.kind not in ("multi", "absent")]
        assert kinds[video] == {str(number): s.kind for number, s in enumerate(single)}
        assert list(entry["expressions"].values()) == [
            {"exp": s.text, "obj_id": str(s.object_ids[0] + 1)} for s in single
        ]


@pytest.mark.parametrize("layout", LAYOUT_KINDS)
def test_same_settings_nothing_to_do_other_settings_refused(tmp_path: Path, layout: str) -> None:
    write = partial(write_shapes, tmp_path, "train", 2, num_frames=6, size=48, layout=layout)
    assert write()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not write()
    with pytest.raises(FileExistsError, match="'seed': 1"):
        write(seed=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(FileExistsError, match="no Shapes"):
        write_shapes(tmp_path, "train", 2, num_frames=6, size=48)


def test_foreign_sentences_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta_expressions/train/meta_expressions.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"videos": {}}')
    with pytest.raises(FileExistsError, match="meta_expressions"):
        write_shapes(tmp_path, "train", 2, num_frames=6, size=48, layout="ref_youtube_vos")
    assert path.read_text() == '{"videos": {}}'
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("layout", LAYOUT_KINDS)
def test_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path: Path, layout: str) -> None:
    def interrupt(numbers: range) -> Iterator[int]:
        yield numbers[0]
        raise KeyboardInterrupt

    write = partial(write_shapes, tmp_path, "train", 2, num_frames=6, size=48, layout=layout)
    with pytest.raises(KeyboardInterrupt):
        write(progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert write()


def test_contact_sheet_has_two_rows_of_every_kind() -> None:
    assert {kind for kind, _ in SHEET_ROWS} == set(KINDS)
    sheet = draw_contact_sheet(0, num_frames=6, size=48)
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] % (2 * len(SHEET_ROWS)) == 0
    assert sheet.shape[2] == 3


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--train-videos", "3", "--valid-videos", "2", "--num-frames", "6", "--size", "48"]
    make_shapes.main(arguments)
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
    assert "3 videos in" in printed
    assert (tmp_path / "contact_sheet.png").is_file()
    assert count_kinds(tmp_path, "valid")["absent"] == 2
    make_shapes.main(arguments)
    assert "already there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*holds"):
        make_shapes.main([*arguments, "--seed", "1"])
