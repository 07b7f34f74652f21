"""Shapes: what its sentences promise, that nothing gives the answer away, and its files, read without our loaders."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from glus.config import PretrainConfig
from glus.distributed import generator
from glus.shapes.render import COLOURS, SHAPES
from glus.shapes.scene import (
    DIRECTIONS,
    KINDS,
    SPLITS,
    STRUCTURES,
    Plan,
    Scene,
    Sentence,
    draw_scenes,
    generate_scene,
    plan_scene,
    scene_of,
)
from glus.shapes.write import EXCHANGED, LAYOUT_KINDS, count_kinds, write_contact_sheet, write_shapes

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import make_shapes
import pretrain_towers

FORMATS = ((16, 128, 35), (8, 96, 21), (24, 64, 14), (6, 48, 21))
"""Frames, side, number of scenes."""
NUM_PLANS = 1400


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene_of(3, "train", index, frames, size) for frames, size, count in FORMATS for index in range(count)]


def plan_of(split: str, index: int) -> Plan:
    """What ``scene_of`` plans, a hundred times faster than it is drawn."""
    return plan_scene(generator(0, SPLITS[split], index), structure=STRUCTURES[index % len(STRUCTURES)])


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [plan_of("valid", index) for index in range(NUM_PLANS)]


def test_scene_has_the_promised_arrays(scenes: list[Scene]) -> None:
    first = scenes[0]
    assert first.frames_THW3.shape == (16, 128, 128, 3)
    assert first.frames_THW3.dtype == np.uint8
    assert first.masks_OTHW.shape == (3, 16, 128, 128)
    assert first.masks_OTHW.dtype == bool
    for scene in scenes:
        assert [item.object_id for item in scene.objects] == [0, 1, 2]
        assert scene.masks_OTHW.sum(0).max() == 1, "visible pixels of two objects never overlap"
        areas = scene.masks_OTHW.sum(axis=(2, 3))
        for item in scene.objects:
            assert areas[item.object_id].min() > 0.15 * np.pi * item.radius**2, "nothing is ever hidden"


def test_same_seed_same_scene_other_split_other_scene() -> None:
    one, again = scene_of(0, "train", 5), scene_of(0, "train", 5)
    assert one.sentences == again.sentences == plan_of("train", 5).sentences
    assert np.array_equal(one.frames_THW3, again.frames_THW3)
    assert np.array_equal(one.masks_OTHW, again.masks_OTHW)
    for other in (scene_of(0, "valid", 5), scene_of(0, "train", 6), scene_of(1, "train", 5)):
        assert not np.array_equal(one.frames_THW3, other.frames_THW3)


def test_masks_lie_on_the_colour_of_their_object(scenes: list[Scene]) -> None:
    hues = {name: np.asarray(rgb) / max(rgb) for name, rgb in COLOURS.items()}
    for scene in scenes[:21]:
        for item in scene.objects:
            for t, name in enumerate(item.colour_T):
                pixels = scene.frames_THW3[t][scene.masks_OTHW[item.object_id, t]].astype(float)
                median = np.median(pixels / pixels.max(1, keepdims=True), axis=0)
                assert min(hues, key=lambda hue: np.abs(hues[hue] - median).sum()) == name


def test_kinds_are_balanced_and_every_sentence_has_its_twin(plans: list[Plan]) -> None:
    assert [plan.structure for plan in plans[: len(STRUCTURES)]] == list(STRUCTURES)
    for plan in plans:
        kinds = [sentence.kind for sentence in plan.sentences]
        assert sorted(kinds) == sorted([*[plan.structure] * 4, "appearance", "multi", "absent"])
        assert set(kinds) <= set(KINDS)
        assert len({sentence.text for sentence in plan.sentences}) == 7
        named = [sentence for sentence in plan.sentences if sentence.kind == plan.structure]
        for sentence in named:
            twins = [s for s in named if s.text.split()[:-1] == sentence.text.split()[:-1]]
            assert {s.object_ids for s in twins} == {(item.object_id,) for item in plan.look_alikes}


def fitting(plan: Plan, text: str) -> set[tuple[int, ...]]:
    """In some frame, objects with every colour and shape that the text names, in the singular or plural."""
    words = {word.rstrip("s") for word in text.split()}
    colours, shapes = words & set(COLOURS), words & set(SHAPES)
    return {
        tuple(
            item.object_id
            for item in plan.objects
            if (not colours or item.colour_T[t] in colours) and (not shapes or item.shape in shapes)
        )
        for t in range(len(plan.objects[0].colour_T))
    }


def test_words_fit_the_named_objects_when_the_evidence_shows_and_no_other_ever(plans: list[Plan]) -> None:
    for plan in plans[:140]:
        for sentence in plan.sentences:
            found = fitting(plan, sentence.text)
            if sentence.kind == "motion":
                continue
            if sentence.kind in STRUCTURES and plan.structure != "seen":
                assert found == {(), sentence.object_ids}, sentence
            else:
                assert found == {sentence.object_ids}, sentence


def test_marks_are_on_in_the_frames_of_evidence_alone(plans: list[Plan]) -> None:
    for plan in plans[:140]:
        one, other = plan.look_alikes
        assert (one.shape, one.texture, one.radius, one.rotation) == (
            other.shape,
            "plain",
            other.radius,
            other.rotation,
        )
        is_alike_T = (one.rgb_T3 == other.rgb_T3).all(1)
        assert np.flatnonzero(~is_alike_T).tolist() == list(plan.marked)
        for sentence in plan.sentences:
            if sentence.kind == "motion":
                assert plan.evidence(sentence) is None
            elif sentence.kind == plan.structure:
                assert plan.evidence(sentence) == plan.marked
            else:
                assert plan.evidence(sentence) == tuple(range(16))


def test_look_alikes_keep_apart_unless_they_cross(plans: list[Plan]) -> None:
    for plan in plans:
        one, other = plan.look_alikes
        nearest = np.linalg.norm(one.path_T2 - other.path_T2, axis=1).min() / 128
        if plan.structure == "crossing":
            gaps_T2 = one.path_T2 - other.path_T2
            axis = int(np.ptp(gaps_T2, axis=0).argmax())
            assert gaps_T2[0, axis] * gaps_T2[-1, axis] < 0
            assert abs(gaps_T2[0, axis]) > 0.4 * 128, "they can be told apart where they are marked"
        else:
            assert nearest > (0.22 if plan.structure == "motion" else 0.28)


def test_named_direction_is_moved_in(plans: list[Plan]) -> None:
    for plan in (plan for plan in plans if plan.structure == "motion"):
        for sentence in (s for s in plan.sentences if s.kind == "motion"):
            direction_2 = np.asarray(DIRECTIONS[sentence.text.split()[-1]])
            steps_T = np.diff(plan.objects[sentence.object_ids[0]].path_T2, axis=0) @ direction_2 / 128
            assert np.allclose(steps_T[steps_T > 0], 0.045)
            assert (steps_T < 0).sum() == 2 or (steps_T < 0).sum() == 1


# ----------------------------------------------------------------------------------- what gives the answer away


def accuracy(plans: Sequence[Plan], cues: Any) -> float:
    """How often a rule learned from half of the scenes names the right one of two look-alikes in the others.

    A ridge regression on ``cues(plan, sentence)`` and their products with the sentence's words.
    """
    words = [*COLOURS, *DIRECTIONS]
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    truth: tuple[list[int], list[int]] = ([], [])
    for number, plan in enumerate(plans):
        for sentence in (s for s in plan.sentences if s.kind == plan.structure):
            said = np.array([word == sentence.text.split()[-1] for word in words], float)
            cue = np.concatenate([[1.0], cues(plan, sentence)])
            half = number // len(STRUCTURES) % 2
            rows[half].append(np.concatenate([cue, np.outer(said, cue).ravel()]))
            truth[half].append(1 if sentence.object_ids[0] == plan.look_alikes[0].object_id else -1)
    x, y = np.array(rows[0]), np.array(truth[0])
    weights = np.linalg.solve(x.T @ x + 3 * np.eye(x.shape[1]), x.T @ y)
    return float(np.mean(np.sign(np.array(rows[1]) @ weights) == truth[1]))


def places(plan: Plan, frames: Sequence[int]) -> np.ndarray:
    """Of both look-alikes in some frames, with squares."""
    paths = np.concatenate([item.path_T2[list(frames)].ravel() / 128 - 0.5 for item in plan.look_alikes])
    return np.concatenate([paths, paths**2])


MARKED = tuple(structure for structure in STRUCTURES if structure != "motion")


@pytest.mark.parametrize(("structures", "slack"), [(MARKED, 0.03), (("motion",), 0.06)], ids=["marked", "motion"])
def test_neither_words_nor_places_nor_one_frame_tell_the_look_alikes_apart(
    plans: list[Plan], structures: tuple[str, ...], slack: float
) -> None:
    """Three standard deviations of as many coins; the first edition's directions showed in one frame out of two."""
    some = [plan for plan in plans if plan.structure in structures]

    def in_a_frame(plan: Plan, sentence: Sentence) -> np.ndarray:
        unmarked = [t for t in range(16) if t not in plan.marked] or [0]
        frame = unmarked[int(plan.objects[0].path_T2.sum()) % len(unmarked)]
        return np.concatenate([places(plan, [frame]), [frame / 16], frame / 16 * places(plan, [frame])])

    assert abs(accuracy(some, lambda plan, sentence: np.zeros(0)) - 0.5) < slack, "the sentence alone"
    assert abs(accuracy(some, lambda plan, sentence: places(plan, [0])) - 0.5) < slack, "where it starts"
    assert abs(accuracy(some, in_a_frame) - 0.5) < slack, "one frame, and its number"


def test_the_rule_finds_what_is_there(plans: list[Plan]) -> None:
    """Two frames tell directions, a frame of evidence tells marks: else the test above would prove nothing."""
    moving = [plan for plan in plans if plan.structure == "motion"]
    assert accuracy(moving, lambda plan, sentence: np.diff(places(plan, [4, 5]).reshape(4, 2, 2), axis=1).ravel()) > 0.7

    def colours(plan: Plan, sentence: Sentence) -> np.ndarray:
        frame = plan.marked[0]
        return np.array([item.colour_T[frame] == name for item in plan.look_alikes for name in COLOURS], float)

    assert accuracy([plan for plan in plans if plan.structure in MARKED], colours) > 0.97


def test_words_alone_do_not_tell_what_is_absent(plans: list[Plan]) -> None:
    """What half of the scenes teach of each text, or of its words but for names, is no help in the others."""
    names = {**dict.fromkeys(COLOURS, "C"), **dict.fromkeys(SHAPES, "S")}
    texts = [
        (number % 2, s)
        for number, plan in enumerate(plans)
        for s in plan.sentences
        if s.kind in ("appearance", "absent")
    ]
    for reduce in (str, lambda text: " ".join(names.get(word, word) for word in text.split())):
        balance = Counter[str]()
        for half, s in texts:
            balance[reduce(s.text)] += (half == 0) * (1 if s.kind == "absent" else -1)
        right = [(balance[reduce(s.text)] > 0) == (s.kind == "absent") for half, s in texts if half == 1]
        assert abs(np.mean(right) - 0.5) < 0.03


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
    masks, kinds, evidence = (load(root / f"{name}.json") for name in ("mask_dict", "kinds", "evidence"))
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
            shown = scene.evidence(sentence) if sentence.kind in STRUCTURES else "not there"
            assert evidence[video].get(exp_id, "not there") == (list(shown) if isinstance(shown, tuple) else shown)
            assert len(value["anno_id"]) == len(value["obj_id"])
            for object_id, anno_id in zip(value["obj_id"], value["anno_id"], strict=True):
                for code, mask in zip(masks[str(anno_id)], scene.masks_OTHW[object_id], strict=True):
                    assert (code is None) == (not mask.any())
                    assert code is None or np.array_equal(rle.decode(code), mask)


def test_half_of_the_exchanged_sentences_name_the_other_look_alike(tmp_path: Path) -> None:
    write_shapes(tmp_path, "train", 2 * len(STRUCTURES), seed=7, num_frames=6, size=48)
    right, exchanged = (load(tmp_path / "train" / name)["videos"] for name in ("meta_expressions.json", EXCHANGED))
    for index, video in enumerate(right):
        plan = scene_of(7, "train", index, 6, 48)
        pair = {item.object_id for item in plan.look_alikes}
        for exp_id, sentence in right[video]["expressions"].items():
            other = exchanged[video]["expressions"][exp_id]
            if index < len(STRUCTURES) and plan.sentences[int(exp_id)].kind == plan.structure:
                assert {*sentence["obj_id"], *other["obj_id"]} == pair
                steps = [other[name][0] - sentence[name][0] for name in ("obj_id", "anno_id")]
                assert steps[0] == steps[1] != 0
                assert {**other, "obj_id": 0, "anno_id": 0} == {**sentence, "obj_id": 0, "anno_id": 0}
            else:
                assert other == sentence


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_towers_learn_from_exchanged_sentences_where_that_is_asked_for(
    is_exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Scene] = []
    monkeypatch.setattr(pretrain_towers, "make_llm", lambda config, scenes, folder: given.extend(scenes))
    settings = {"num_scenes": 2 * len(STRUCTURES), "num_frames": 6, "is_exchanged": is_exchanged}
    config = PretrainConfig(output=str(tmp_path), parts=["llm"], **settings)
    config.model.clip.architecture["image_size"] = 48
    pretrain_towers.pretrain_towers(config)
    drawn = draw_scenes(config.seed, config.num_scenes, 6, 48)
    changed = [one.sentences != other.sentences for one, other in zip(given, drawn, strict=True)]
    assert changed == [is_exchanged] * len(STRUCTURES) + [False] * len(STRUCTURES)


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
def test_interrupted_run_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(numbers: range, *_: object) -> Iterator[int]:
        yield numbers[0]
        raise KeyboardInterrupt

    write = partial(write_shapes, tmp_path, "train", 2, num_frames=6, size=48, layout=layout)
    with monkeypatch.context() as stopped:
        stopped.setattr("glus.shapes.write.bar", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []
    assert write()


def test_contact_sheet_has_a_row_of_every_kind(tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "sheet.png", 0, num_frames=6, size=48)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] % len(KINDS) == 0
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
