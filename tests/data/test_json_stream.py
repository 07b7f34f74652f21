"""A JSON object read member by member, with windows so small that every token is cut."""

import json

import pytest

from glus.data.mask_pack import iterate_members

OBJECT = {"a": [1, {"b": None}, 'x\\"ü'], "": {}, "n": -12.5e3, "t": True, "long": "y" * 100}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
def test_members_are_those_of_the_object(tmp_path, chunk, indent):
    path = tmp_path / "a.json"
    path.write_text(f" \n{json.dumps(OBJECT, indent=indent, ensure_ascii=False)}\t", encoding="utf-8")
    assert list(iterate_members(path, chunk)) == list(OBJECT.items())


def test_a_name_may_come_twice_and_an_object_may_be_empty(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"1": 2, "1": 3}')
    assert list(iterate_members(path)) == [("1", 2), ("1", 3)]
    path.write_text("{}")
    assert list(iterate_members(path)) == []


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0), ("[1]", 0), ('{"a": 1', 7), ('{"a" 1}', 5), ('{"a": }', 6), ('{"a": [1, 2}', 11), ('{"a": "b', 6),
        ('{"a": 1,}', 8), ('{"a": 1} 2', 9), ("{1: 2}", 2), ('{"a": 1 "b"}', 8), ("{,}", 1),
    ],
)  # fmt: skip
def test_mistakes_are_located(tmp_path, text, position, chunk):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json is not JSON as expected: .* at character {position}$"):
        list(iterate_members(path, chunk))


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8 text"):
        list(iterate_members(path))
