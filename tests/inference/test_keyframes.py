"""Files of key frames in the published format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from glus.inference.key_frames import read_key_frames, write_key_frames
from glus.types import Expression

NAMES = ("00000", "00005", "00010")


def expression(video: str, exp_id: str, frames: tuple[str, ...] = NAMES) -> Expression:
    return Expression("mevis", video, exp_id, "the cat", frames, (), ())


EXPRESSIONS = [expression("a_b", "0"), expression("folder/c", "11")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "key_frames.json"
    path.write_text(json.dumps({"a_b_0": 10, "folder/c_11": 0, "another_split_3": 7}))
    return path


def test_frames_are_found_by_the_number_that_is_their_name(file):
    assert read_key_frames(file, EXPRESSIONS) == {"mevis/a_b/0": 2, "mevis/folder/c/11": 0}
    assert read_key_frames(file, EXPRESSIONS[:1]) == {"mevis/a_b/0": 2}


def test_written_as_published_and_read_back(tmp_path):
    path = tmp_path / "new" / "key_frames.json"
    named = expression("d", "0", ("left", "right"))
    write_key_frames(path, zip([*EXPRESSIONS, named], (1, 2, 1), strict=True))
    assert json.loads(path.read_text()) == {"a_b_0": 5, "folder/c_11": 10, "d_0": "right"}
    assert list(read_key_frames(path, [*EXPRESSIONS, named]).values()) == [1, 2, 1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("frame", [7, "first", 5.0, True, None, [5]])
def test_a_frame_that_the_video_does_not_have_is_named_with_its_expression_and_file(file, frame):
    file.write_text(json.dumps({"a_b_0": frame}))
    message = rf"{file}: mevis/a_b/0 has key frame {re.escape(repr(frame))}; .* its 3 frames, 00000 to 00010"
    with pytest.raises(ValueError, match=message):
        read_key_frames(file, EXPRESSIONS[:1])


def test_expressions_without_an_entry_are_counted_and_the_first_are_named(file):
    others = [expression("x", str(number)) for number in range(5)]
    message = r"no entry for 5 of 7 expressions: mevis/x/0, mevis/x/1, mevis/x/2, \.\.\.;"
    with pytest.raises(ValueError, match=message):
        read_key_frames(file, [*EXPRESSIONS, *others])


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[1, 2]", "expected an object")])
def test_another_file_is_refused(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_key_frames(file, EXPRESSIONS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"inference.key_frames=.*nowhere.json: no such file"):
        read_key_frames(tmp_path / "nowhere.json", EXPRESSIONS)


def test_expressions_that_the_format_cannot_tell_apart_are_refused(tmp_path):
    twins = [expression("a", "b_0"), expression("a_b", "0")]
    with pytest.raises(ValueError, match=r"mevis/a/b_0 and mevis/a_b/0 would both be 'a_b_0'"):
        write_key_frames(tmp_path / "key_frames.json", [(twin, 0) for twin in twins])
