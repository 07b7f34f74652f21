"""What is written is there complete or not at all, and JSON is read strictly, with the file's name in what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glus.files import atomic_file, atomic_folder, hidden_sibling, read_json, read_object, write_text


def below(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fail(path: Path) -> None:
    path.write_bytes(b"ha")
    raise ValueError("something went wrong")


def test_a_file_appears_at_the_end_or_never(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(ValueError, match="wrong"), atomic_file(path.parent / "never" / "file") as temporary:
        fail(temporary)
    assert below(tmp_path) == []
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    with pytest.raises(ValueError, match="wrong"), atomic_file(path) as temporary:
        fail(temporary)
    assert path.read_bytes() == b"whole"
    assert below(tmp_path) == ["new", "new/file"]


def test_a_file_replaces_what_a_killed_process_left(tmp_path: Path) -> None:
    hidden_sibling(tmp_path / "file").write_text("half of something longer")
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert (below(tmp_path), (tmp_path / "file").read_text()) == (["file"], "whole")


def test_text_replaces_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    for text in ("", "猫\n", "last"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert below(tmp_path) == ["new", "new/text"]


def test_processes_that_write_the_same_text_at_once_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins and ends while this one has written, but not renamed."""
    path, replace = tmp_path / "text", os.replace

    def late(source: Path, target: Path) -> None:
        with monkeypatch.context() as other:
            other.setattr(os, "replace", replace)
            other.setattr(os, "getpid", lambda: 0)
            write_text(path, "the other's")
        assert path.read_text() == "the other's"
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    write_text(path, "mine")
    assert (below(tmp_path), path.read_text()) == (["text"], "mine")


def test_text_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").touch()
    with pytest.raises(OSError, match=r"cannot write .*folder: Is a directory \(.* MiB free below"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(OSError, match=r"cannot write .*text/deeper: Not a directory \(.* MiB free below"):
        write_text(tmp_path / "text/deeper/text", "text")
    assert below(tmp_path) == ["folder", "text"]


def test_a_folder_appears_at_the_end_or_never(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), atomic_folder(tmp_path / "new" / "folder") as folder:
        fail(folder / "half")
    path = tmp_path / "result"
    hidden_sibling(path).mkdir()
    (hidden_sibling(path) / "left by a killed process").touch()
    with atomic_folder(path) as folder:
        (folder / "done").touch()
        assert not path.exists()
    with pytest.raises(ValueError, match="wrong"), atomic_folder(path, replace=True) as folder:
        fail(folder / "half")
    assert below(tmp_path) == ["result", "result/done"]


def test_a_folder_with_files_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.mkdir()
    for name, replace in (("first", False), ("second", True)):
        with atomic_folder(path, replace) as folder:
            (folder / name).touch()
        assert below(tmp_path) == ["result", f"result/{name}"]
    with pytest.raises(OSError, match=r"cannot write .*result: Directory not empty"), atomic_folder(path):
        pass
    assert below(tmp_path) == ["result", "result/second"]


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
