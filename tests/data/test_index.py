import json
import logging
from dataclasses import replace

import pytest

from glus.config import DatasetConfig, ExpectedCounts, Layout
from glus.data.benchmarks.index import LAYOUTS, by_video, read_expressions, require_annotations, trainable
from glus.types import Expression


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def mevis(root, expressions, split="train", file="meta_expressions.json", frames=("00000", "00001"), groups=None):
    write(root / split / file, {"videos": {"v1": {"frames": list(frames), "expressions": expressions}}})
    return DatasetConfig(name="mevis", layout=Layout.mevis, root=str(root), split=split, groups=groups)


def ref_youtube_vos(root, videos, split="train"):
    write(root / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})
    layout = Layout.ref_youtube_vos if split == "train" else Layout.ref_youtube_vos_valid
    return DatasetConfig(name="rytvos", layout=layout, root=str(root), split=split)


@pytest.mark.parametrize(
    "file", ["meta_expressions.json", "meta_expressions_v2.json", "meta_expressions_v2_release.json"]
)
def test_mevis_2_reads_objects_and_empty_lists_under_all_three_file_names(tmp_path, file):
    expressions = {
        "0": {"exp": "4 lizards", "obj_id": [0, 1], "anno_id": [2, 3]},
        "1": {"exp": "Nothing.", "obj_id": [], "anno_id": []},
    }
    first, second = read_expressions(replace(mevis(tmp_path, expressions, file=file), layout=Layout.mevis_v2))
    assert (first.name, first.text, first.frames) == ("mevis/v1/0", "4 lizards", ("00000", "00001"))
    assert (first.object_ids, first.annotation_ids, first.group) == ((0, 1), ("2", "3"), "")
    assert (second.text, second.object_ids, second.annotation_ids) == ("Nothing.", (), ())


def test_mevis_1_is_never_version_2_and_other_counts_than_published_are_told(tmp_path, caplog):
    expressions = {"0": {"exp": "4 lizards", "obj_id": [0], "anno_id": [2]}}
    config = mevis(tmp_path, expressions, file="meta_expressions_v2.json")
    with pytest.raises(FileNotFoundError, match=r"meta_expressions\.json; there is meta_expressions_v2\.json"):
        read_expressions(config)
    config = replace(config, layout=Layout.mevis_v2, expected=ExpectedCounts(videos=1, expressions=907))
    read_expressions(config)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"mevis: 1 expressions in {tmp_path}/train/meta_expressions_v2.json, but published are 907"
    ]


def test_expressions_come_in_numeric_order_and_frames_as_listed(tmp_path):
    videos = {
        "v": {
            "expressions": {key: {"exp": key, "obj_id": "3"} for key in ("10", "2", "0")},
            "frames": ["00005", "00008", "00011"],
        }
    }
    expressions = read_expressions(ref_youtube_vos(tmp_path, videos))
    assert [e.exp_id for e in expressions] == ["0", "2", "10"]
    assert {(e.frames, e.object_ids, e.annotation_ids) for e in expressions} == {
        (("00005", "00008", "00011"), (3,), ("3",))
    }


def test_keys_that_are_not_numbers_keep_the_order_of_the_file(tmp_path):
    config = mevis(tmp_path, {key: {"exp": key} for key in ("b", "10", "a")}, split="valid")
    assert [e.exp_id for e in read_expressions(config)] == ["b", "10", "a"]


def test_a_split_without_public_masks_is_read_but_cannot_be_trained_on(tmp_path):
    config = mevis(tmp_path, {"0": {"exp": "a dog"}}, split="valid")
    expressions = read_expressions(config)
    assert expressions[0].annotation_ids == ()
    with pytest.raises(ValueError, match=r"mevis.*valid.*no.* annotations.*cannot be trained on"):
        require_annotations(config, expressions)


def test_one_expression_without_its_objects_is_an_error_where_others_have_them(tmp_path):
    config = mevis(tmp_path, {"0": {"exp": "a dog", "obj_id": [0], "anno_id": [0]}, "1": {"exp": "a cat"}})
    with pytest.raises(ValueError, match=r"1 expressions have no 'obj_id'.*v1/1"):
        read_expressions(config)


def test_valid_of_ref_youtube_vos_leaves_the_test_videos_out(tmp_path):
    entry = {"expressions": {"0": {"exp": "a dog"}}, "frames": ["00000"]}
    ref_youtube_vos(tmp_path, {"t": entry}, split="test")
    config = ref_youtube_vos(tmp_path, {"v": entry, "t": entry}, split="valid")
    assert [e.video for e in read_expressions(config)] == ["v"]


def test_groups_come_from_the_sidecar(tmp_path):
    config = mevis(tmp_path, {"0": {"exp": "a dog"}}, groups="kinds.json")
    with pytest.raises(FileNotFoundError, match=r"kinds.json"):
        read_expressions(config)
    write(tmp_path / "train" / "kinds.json", {"v1": {"0": "motion"}})
    assert [e.group for e in read_expressions(config)] == ["motion"]
    write(tmp_path / "train" / "kinds.json", {"v1": {}})
    with pytest.raises(ValueError, match=r"no group for v1/0"):
        read_expressions(config)


def test_a_missing_file_names_dataset_layout_and_path(tmp_path):
    config = DatasetConfig(name="mevis", layout=Layout.mevis, root=str(tmp_path / "nowhere"), split="train")
    with pytest.raises(FileNotFoundError, match=r"'mevis' \(mevis layout\).*nowhere/train/meta_expressions.json$"):
        read_expressions(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ({}, "expected a dict under 'videos', found nothing"),
        ({"videos": {}}, "holds no expression"),
        ({"videos": {"v": {"expressions": {}}}}, r"videos\['v'\]: expected a list under 'frames'"),
        ({"videos": {"v": {"frames": ["0", "0"], "expressions": {}}}}, "distinct frame names"),
        (
            {"videos": {"v": {"frames": ["0"], "expressions": {"0": {"exp": 3}}}}},
            r"\['0'\]: expected a str under 'exp'",
        ),
        (
            {"videos": {"v": {"frames": ["0"], "expressions": {"0": {"exp": "a", "obj_id": [1], "anno_id": []}}}}},
            "1 obj_id but 0 anno_id",
        ),
    ],
)
def test_a_malformed_file_is_an_error_that_says_where(tmp_path, content, message):
    write(tmp_path / "train" / "meta_expressions.json", content)
    with pytest.raises(ValueError, match=message):
        read_expressions(DatasetConfig(name="mevis", layout=Layout.mevis, root=str(tmp_path), split="train"))


def test_training_counts_the_short_videos_it_leaves_out(tmp_path, caplog):
    videos = {
        name: {"expressions": {"0": {"exp": name, "obj_id": "1"}}, "frames": [f"{i:05d}" for i in range(length)]}
        for name, length in (("short", 3), ("long", 4), ("picture", 1))
    }
    expressions = read_expressions(ref_youtube_vos(tmp_path, videos))
    with caplog.at_level(logging.WARNING):
        assert [e.video for e in trainable(expressions, 4)] == ["long", "picture"]
    assert "leaves out 1 videos (1 expressions) with fewer than 4 frames: rytvos/short" in caplog.text
    with pytest.raises(ValueError, match=r"no video has the 5 query frames"):
        trainable(expressions[:2], 5)


def test_expressions_of_a_video_need_not_be_neighbours():
    first, second, third = (Expression("d", name, exp_id, "x", ("0",), (), ()) for name, exp_id in ("b0", "a0", "b1"))
    assert by_video([first, second, third]) == [[first, third], [second]]


def test_every_layout_has_its_row():
    assert list(LAYOUTS) == list(Layout)
    assert {layout.value for layout, row in LAYOUTS.items() if not row.frame_folder} == {"refcoco", "reason_seg"}


def test_a_line_of_a_list_of_videos_is_an_id(tmp_path):
    """Byte order mark, Windows' line ends, empty lines and remarks are none."""
    path = tmp_path / "train/meta_expressions.json"
    ids = ["clip 1", "clip 2", "#3", "4"]
    write(path, {"videos": {video: {"frames": ["0"], "expressions": {"0": {"exp": "a"}}} for video in ids}})
    dataset = DatasetConfig("own", Layout.mevis, str(tmp_path), "train", videos="list.txt")
    (tmp_path / "list.txt").write_bytes("\ufeffclip 1\r\n\r\n# of Monday\n  \n#3\nclip 2\t\n".encode())
    assert [expression.video for expression in read_expressions(dataset)] == ["clip 1", "clip 2", "#3"]
    (tmp_path / "list.txt").write_text("clip 1 clip 2")
    with pytest.raises(ValueError, match="names 1 videos that the split does not have, such as 'clip 1 clip 2'"):
        read_expressions(dataset)
    (tmp_path / "list.txt").write_bytes("clip 1".encode("utf-16"))
    with pytest.raises(ValueError, match=r"list\.txt is not text in UTF-8"):
        read_expressions(dataset)
