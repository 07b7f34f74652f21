"""JSON files are read strictly, and what is wrong is said with the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from glus.files import read_json, read_object


def test_encodings_are_tried_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('["caf\u00e9"]'.encode("cp1252"))
    assert read_json(path, ("utf-8", "cp1252")) == ["caf\u00e9"]
    with pytest.raises(ValueError, match=r"a\.json is not text in utf-8: "):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: "),
        ('{"x": {"a": 1, "b": 2, "a": 3}}', "is no JSON: key 'a' stands twice"),
        ("[1, 2]", "holds a list, expected an object"),
    ],
)
def test_what_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        read_object(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no a\.json"):
        read_json(tmp_path / "a.json")
