"""The packed copy of mask_dict.json: equal to it, up to date, whole, and shared."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glus.data.masks import MaskPack, encode_rle, pack_paths

MASKS = {
    "7": [{"size": [3, 5], "counts": "?0"}, None, {"counts": "22;", "size": [3, 5]}],
    "x/ü": [],
    "8": [None, {"size": [4000, 2], "counts": ""}],
    "9": [7, {"size": [2, 2], "counts": [1, 3]}, {"size": [0, 0], "counts": "0"}, {"size": [2, 2], "counts": "é"}],
}
PACKED = "mask_dict.json.packed"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "mask_dict.json", MASKS)


def write(path: Path, masks: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(masks))
    return path


def many_annotations(count: int, frames: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    code = [{"size": [8, 8], "counts": encode_rle(rng.random((8, 8)) < 0.5)} for _ in range(50)]
    return {str(i): [code[(i + t) % 50] if (i + t) % 7 else None for t in range(frames)] for i in range(count)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_holds_what_the_json_holds(source: Path) -> None:
    pack = MaskPack(source)
    assert dict(pack) == MASKS
    assert list(pack) == list(MASKS)
    assert "7" in pack
    assert "70" not in pack


@pytest.mark.parametrize("count", [0, 1, 20_000])
def test_any_number_of_annotations(tmp_path: Path, count: int) -> None:
    masks = many_annotations(count)
    source = write(tmp_path / "mask_dict.json", masks)
    assert dict(MaskPack(source)) == dict(MaskPack(source)) == masks


def test_it_is_built_once(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert dict(MaskPack(source)) == MASKS
    assert caplog.text.count("packed 4 annotations of") == 1
    assert names(source.parent) == ["mask_dict.json", PACKED]
    assert pack_paths(source)[0].stat().st_mode == source.stat().st_mode


@pytest.mark.parametrize("is_same_time", [True, False])
def test_it_follows_its_source(source: Path, caplog: pytest.LogCaptureFixture, is_same_time: bool) -> None:
    """Also where a tool kept size and time."""
    MaskPack(source)
    before = source.stat()
    changed = json.loads(source.read_text().replace("22;", "23:"))
    write(source, changed)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if is_same_time else 1)))
    assert source.stat().st_size == before.st_size
    assert dict(MaskPack(source)) == changed
    assert caplog.text.count("made from another state of its source, or by another version); it is made anew") == 1


def test_an_open_copy_survives_a_rebuild(source: Path) -> None:
    opened = MaskPack(source)
    write(source, {"1": []})
    assert list(MaskPack(source)) == ["1"]
    assert dict(opened) == MASKS


def test_a_copy_cut_short_anywhere_is_made_anew(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    MaskPack(source)
    packed = pack_paths(source)[0]
    whole = packed.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 30)]:
        packed.write_bytes(whole[:length])
        caplog.clear()
        assert dict(MaskPack(source)) == MASKS
        assert f"{PACKED} cannot be used (" in caplog.text
        assert packed.read_bytes() == whole


@pytest.mark.parametrize("foreign", [b"something else" * 20, bytes(4096), b"[1]\n", b'{"source": 1}\n', b"\xff\n"])
def test_a_foreign_file_in_its_place_is_replaced(
    source: Path, foreign: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    pack_paths(source)[0].write_bytes(foreign)
    assert dict(MaskPack(source)) == MASKS
    assert f"{PACKED} cannot be used (" in caplog.text


def test_a_damaged_annotation_is_named(source: Path) -> None:
    """Blocks that a disk lost come back as zeros."""
    MaskPack(source)
    packed = pack_paths(source)[0]
    data = packed.read_bytes()
    packed.write_bytes(data[:-9] + bytes(9))
    damaged = MaskPack(source)
    assert damaged["7"] == MASKS["7"]
    with pytest.raises(ValueError, match=r"mask_dict.json.packed is damaged \(.*\); delete it, and it is made anew"):
        damaged["9"]


def test_a_user_without_a_home_needs_none(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert dict(MaskPack(source)) == MASKS
    beside = source.with_name(PACKED)
    assert pack_paths(source) == (beside,)
    beside.unlink()
    beside.mkdir()  # as good as a folder without permission, also for root
    with pytest.raises(OSError, match=r"mask_dict.json cannot be packed anywhere: .*set XDG_CACHE_HOME"):
        MaskPack(source)


def test_without_permission_beside_the_source_it_goes_to_the_users_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, user = pack_paths(source)
    assert user.parent == tmp_path / "cache" / "glus"
    open_any = Path.open

    def refuse_beside(path: Path, mode: str = "r", **settings: Any) -> Any:
        if path.parent == beside.parent and mode == "wb":
            raise PermissionError(13, "Permission denied")
        return open_any(path, mode, **settings)

    monkeypatch.setattr(Path, "open", refuse_beside)
    for _ in range(2):
        assert dict(MaskPack(source)) == MASKS
        assert names(user.parent) == [user.name]
        assert names(source.parent) == ["mask_dict.json"]
    user.parent.rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "glus").write_text("no folder")
    with pytest.raises(OSError, match=r"cannot be packed anywhere: .*Permission denied; .*set XDG_CACHE_HOME"):
        MaskPack(source)


def test_two_files_of_one_name_do_not_share_a_place_in_the_users_cache(tmp_path: Path) -> None:
    train, valid = (pack_paths(tmp_path / split / "mask_dict.json")[1] for split in ("train", "valid"))
    assert train != valid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": [], "1": []}', "key '1' stands twice"),
        ('{"1": {"0": null}}', "annotation '1' is no list"),
        ("[]", "holds a list, expected an object"),
        ('{"1": [null', r"is no JSON: .*\(char 11\)"),
        ('{"1": [], }', r"is no JSON: .*\(char \d+\)"),
    ],
)
def test_a_malformed_source_is_named_and_leaves_nothing(tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "mask_dict.json"
    source.write_text(text)
    with pytest.raises(ValueError, match=rf"mask_dict.json.*{message}"):
        MaskPack(source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path) -> None:
    def read(path: Path) -> dict[str, Any]:
        path.write_text("{}")
        return {"1": []}

    with pytest.raises(ValueError, match=r"mask_dict.json changed while it was read"):
        MaskPack(source, read)
    assert names(source.parent) == ["mask_dict.json"]


def open_and_count(path: str, gate: Any, results: Any) -> None:
    gate.wait()
    pack = MaskPack(Path(path))
    results.put((len(pack), sum(map(len, pack.values()))))


def test_processes_may_build_it_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "mask_dict.json", many_annotations(20_000))
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_and_count, args=(str(source), gate, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [results.get() for _ in processes] == [(20_000, 60_000)] * 3
    assert names(tmp_path) == ["mask_dict.json", PACKED]


def test_a_killed_build_is_in_nobodys_way(source: Path) -> None:
    code = "import os, sys, pathlib, glus.data.masks as m\nos.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    killed = subprocess.run([sys.executable, "-c", f"{code}m.MaskPack(pathlib.Path(sys.argv[1]))", source], check=False)
    assert killed.returncode == -9
    left, original = names(source.parent)
    assert left.startswith(f".{PACKED}.")
    assert original == "mask_dict.json"
    assert dict(MaskPack(source)) == MASKS
    assert names(source.parent) == [left, original, PACKED]
