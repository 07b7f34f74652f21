"""What is written is there complete or not at all, and JSON is read strictly, with the file's name in what is wrong."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from glus.files import (
    atomic_file,
    atomic_folder,
    check_target,
    hidden_sibling,
    is_empty,
    naming_write_errors,
    read_json,
    read_object,
    require_room,
    write_text,
)
from tests.mounts import mount


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
    """The other one, of the same number on another machine, begins and ends while this one has written, not renamed."""
    path, replace = tmp_path / "text", os.replace

    def late(source: Path, target: Path) -> None:
        with monkeypatch.context() as other:
            other.setattr(os, "replace", replace)
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


@pytest.mark.parametrize("is_mounted", [False, True])
@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("earlier", [[], ["first", "second/deep"]])
def test_a_folder_that_cannot_be_renamed_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mounted: bool, is_link: bool, earlier: list[str]
) -> None:
    """A mount point (as Docker's -v makes one), a link to it or to a plain folder; with an earlier result or empty."""
    (tmp_path / "there").mkdir()
    path = tmp_path / ("link" if is_link else "there")
    if is_link:
        path.symlink_to("there")
    for name in earlier:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("old")
    if is_mounted:
        mount(tmp_path / "there", monkeypatch)
    with pytest.raises(ValueError, match="wrong"), atomic_folder(path, replace=True) as folder:
        fail(folder / "half")
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == earlier
    with atomic_folder(path, replace=bool(earlier)) as folder:
        (folder / "second").write_text("new")
        (folder / "third").mkdir()
        assert all((path / name).read_text() == "old" for name in earlier)
    assert below(tmp_path / "there") == ["second", "third"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["link"] if is_link else []) + ["there"]
    assert path.is_symlink() == is_link


def test_a_folder_whose_parent_may_not_be_written_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "result", os.rename
    path.mkdir()

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with atomic_folder(path) as folder:
        (folder / "done").touch()
    assert below(tmp_path) == ["result", "result/done"]


def test_a_link_to_nothing_yet_is_followed(tmp_path: Path) -> None:
    for name in ("folder", "text"):
        (tmp_path / name).symlink_to(f"{name} there")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "done").touch()
    write_text(tmp_path / "text" / "file", "whole")
    assert below(tmp_path) == ["folder", "folder there", "folder there/done", "text", "text there", "text there/file"]


@pytest.mark.parametrize("number", range(5))
def test_an_exchange_of_contents_that_fails_is_undone_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One of its five moves fails: two put the old aside, three the new in its place."""
    path, rename, moves = tmp_path / "result", os.rename, iter(range(99))
    with atomic_folder(path) as folder:
        (folder / "a").write_text("old")
        (folder / "b").mkdir()

    def break_once(source: Path, target: Path) -> None:
        if Path(target).parent != tmp_path and next(moves) == number:
            raise OSError(errno.EIO, "Input/output error", str(source), None, str(target))
        rename(source, target)

    def replace() -> None:
        with atomic_folder(path, replace=True) as folder:
            for name in "acd":
                (folder / name).write_text("new")
            monkeypatch.setattr(os, "rename", break_once)

    with pytest.raises(OSError, match="Input/output error") as error:
        replace()
    assert (below(path), (path / "a").read_text()) == (["a", "b"], "old")
    finished = Path(str(error.value).rpartition(" lies in ")[2])
    assert below(finished) == ["a", "c", "d"]
    with atomic_folder(path, replace=True) as folder:
        (folder / "e").touch()
    assert below(tmp_path) == ["result", "result/e"]


def test_what_cannot_be_replaced_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path, reason in ((tmp_path / "full", "Directory not empty"), (tmp_path / "full/file", "Not a directory")):
        with pytest.raises(OSError, match=reason), atomic_folder(path):
            raise AssertionError("too late")
    assert not is_empty(tmp_path / "full")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room or choose another place, and run the same command again"),
        (errno.EDQUOT, "make room or choose another place, and run the same command again"),
        (errno.EBUSY, "in use, as a mount point is: choose a folder in it"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EROFS, "choose a place that you may write to"),
    ],
)
def test_advice_fits_the_error(tmp_path: Path, number: int, advice: str) -> None:
    with (
        pytest.raises(OSError, match=rf"cannot write {tmp_path}: .*; .*{advice}") as error,
        naming_write_errors(tmp_path),
    ):
        raise OSError(number, os.strerror(number))
    assert ("room" in str(error.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert "is kept" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "is_file", "reason"),
    [
        ("new/new", True, ""),
        ("new/new", False, ""),
        ("folder", False, ""),
        ("file", True, ""),
        ("folder", True, "Is a directory"),
        ("file", False, "Not a directory"),
        ("file/new", False, "Not a directory"),
        ("loop/new", True, "Too many levels of symbolic links"),
        ("folder/" + 300 * "x", False, "File name too long"),
        ("shut/new", True, "Permission denied"),
    ],
)
def test_what_could_not_be_written_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, is_file: bool, reason: str
) -> None:
    for name in ("folder", "shut"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut")  # root may write anywhere
    if reason:
        with pytest.raises(OSError, match=f"cannot write .*: {reason}"):
            check_target(tmp_path / target, is_file)
    else:
        check_target(tmp_path / target, is_file)
    assert below(tmp_path) == ["file", "folder", "loop", "shut"]


def test_a_file_that_is_a_mount_point_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``docker -v $PWD/report.html:/report.html`` makes it: it can be written to, but not replaced."""
    (tmp_path / "report.html").touch()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "report.html")
    with pytest.raises(OSError, match=r"cannot write .*report.html: .*; it is in use, as a mount point is"):
        check_target(tmp_path / "report.html", is_file=True)
    check_target(tmp_path / "other.html", is_file=True)


def test_files_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    require_room(tmp_path, 256)
    with pytest.raises(OSError, match=r"has 1.0 MiB free, but 512 files take at least 2.0: make room"):
        require_room(tmp_path, 512)


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
        ("[" * 100_000, "is no JSON: "),
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
