"""The packed copy of mask_dict.json: equal to it, up to date, whole, and shared."""

import json
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from glus.data.mask_pack import Code, MaskCache, cache_paths
from glus.data.rle import encode_rle

MASKS = {
    "7": [{"size": [3, 5], "counts": "?0"}, None, {"counts": "22;", "size": [3, 5]}],
    "x/ü": [],
    "8": [None, {"size": [4000, 2], "counts": ""}],
    "9": [7, {"size": [2, 2], "counts": [1, 3]}, {"size": [0, 0], "counts": "0"}, {"size": [2, 2], "counts": "é"}],
}


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "data" / "mask_dict.json", MASKS)


def write(path, masks):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(masks))
    return path


def content(cache):
    """What the JSON held."""

    def plain(entry):
        return {"size": list(entry.size), "counts": entry.counts.decode()} if isinstance(entry, Code) else entry

    return {name: [plain(cache.entry(name, i)) for i in range(cache.length(name))] for name in cache.ids}


def many_annotations(count, frames=3):
    rng = np.random.default_rng(0)
    code = [{"size": [8, 8], "counts": encode_rle(rng.random((8, 8)) < 0.5)} for _ in range(50)]
    return {str(i): [code[(i + t) % 50] if (i + t) % 7 else None for t in range(frames)] for i in range(count)}


def rebuilds(caplog):
    return sum("packed" in record.message and "annotations of" in record.message for record in caplog.records)


def test_it_holds_what_the_json_holds(source):
    cache = MaskCache(source)
    assert content(cache) == MASKS
    assert cache.entry("7", 0) == Code(b"?0", (3, 5))
    assert "7" in cache
    assert "70" not in cache


def test_many_annotations(tmp_path):
    masks = many_annotations(20_000)
    assert content(MaskCache(write(tmp_path / "mask_dict.json", masks))) == masks


def test_it_is_built_once(source, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert content(MaskCache(source)) == MASKS
    assert rebuilds(caplog) == 1
    assert sorted(path.name for path in source.parent.iterdir()) == ["mask_dict.json", "mask_dict.json.packed"]


@pytest.mark.parametrize("is_same_time", [True, False])
def test_it_follows_its_source(source, caplog, is_same_time):
    """Also where a tool kept size and time."""
    MaskCache(source)
    before = source.stat()
    changed = json.loads(source.read_text().replace("22;", "23:"))
    write(source, changed)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if is_same_time else 1)))
    assert source.stat().st_size == before.st_size
    assert content(MaskCache(source)) == changed
    assert caplog.text.count("was made from another state of its source; it is made anew") == 1


def test_an_open_copy_survives_a_rebuild(source):
    opened = MaskCache(source)
    write(source, {"1": []})
    assert MaskCache(source).ids == ("1",)
    assert content(opened) == MASKS


def test_a_copy_cut_short_anywhere_is_made_anew(source, caplog):
    MaskCache(source)
    packed = cache_paths(source)[0]
    whole = packed.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 30)]:
        packed.write_bytes(whole[:length])
        caplog.clear()
        assert content(MaskCache(source)) == MASKS
        assert "cut short" in caplog.text or "cannot be read" in caplog.text
        assert packed.read_bytes() == whole


@pytest.mark.parametrize("foreign", [b"something else" * 20, bytes(4096)])
def test_a_foreign_file_in_its_place_is_replaced(source, foreign, caplog):
    cache_paths(source)[0].write_bytes(foreign)
    assert content(MaskCache(source)) == MASKS
    assert "is no packed mask file" in caplog.text


def test_a_user_without_a_home_needs_none(source, monkeypatch):
    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert content(MaskCache(source)) == MASKS
    beside = source.with_name(f"{source.name}.packed")
    assert cache_paths(source) == (beside,)
    beside.unlink()
    beside.with_name(f"{beside.name}.partial").mkdir()  # as good as a folder without permission, also for root
    with pytest.raises(OSError, match=r"mask_dict.json cannot be packed anywhere: .*set XDG_CACHE_HOME"):
        MaskCache(source)


def test_without_permission_beside_the_source_it_goes_to_the_users_cache(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, user = cache_paths(source)
    assert user.parent == tmp_path / "cache" / "glus"
    beside.with_name(f"{beside.name}.partial").mkdir()  # as good as a folder without permission, also for root
    assert content(MaskCache(source)) == MASKS
    assert [path.name for path in user.parent.iterdir()] == [user.name]
    user.parent.rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "glus").write_text("no folder")
    with pytest.raises(OSError, match=r"mask_dict.json cannot be packed anywhere: .*set XDG_CACHE_HOME"):
        MaskCache(source)


def test_two_files_of_one_name_do_not_share_a_place_in_the_users_cache(tmp_path):
    train, valid = (cache_paths(tmp_path / split / "mask_dict.json")[1] for split in ("train", "valid"))
    assert train != valid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": [], "1": []}', "lists annotation '1' twice"),
        ('{"1": {"0": null}}', "annotation '1' is no list"),
        ("[]", "is not JSON as expected"),
        ('{"1": [null', "is not JSON as expected"),
    ],
)
def test_a_malformed_source_is_named_and_leaves_nothing(tmp_path, text, message):
    source = tmp_path / "mask_dict.json"
    source.write_text(text)
    with pytest.raises(ValueError, match=message):
        MaskCache(source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_that_changes_while_it_is_read_is_refused(source):
    def members(path):
        yield "1", []
        path.write_text("{}")

    with pytest.raises(ValueError, match=r"mask_dict.json changed while it was read"):
        MaskCache(source, members)
    assert list(source.parent.iterdir()) == [source]


def open_and_count(path, gate, results):
    logging.basicConfig(level=logging.INFO)
    built = []
    logging.getLogger("glus.data.mask_pack").addFilter(lambda record: built.append("packed" in record.msg) or True)
    gate.wait()
    cache = MaskCache(Path(path))
    results.put((len(cache.ids), sum(cache.length(name) for name in cache.ids), sum(built)))


def test_processes_that_build_at_once_build_it_once(tmp_path):
    source = write(tmp_path / "mask_dict.json", many_annotations(20_000))
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_and_count, args=(str(source), gate, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = [results.get() for _ in processes]
    assert [(ids, entries) for ids, entries, _ in found] == [(20_000, 60_000)] * 3
    assert sum(built for *_, built in found) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask_dict.json", "mask_dict.json.packed"]


@pytest.mark.slow
def test_a_killed_build_is_in_nobodys_way(tmp_path):
    masks = many_annotations(60_000)
    source = write(tmp_path / "mask_dict.json", masks)
    packed = cache_paths(source)[0]
    partial = packed.with_name(f"{packed.name}.partial")
    context = multiprocessing.get_context("spawn")
    for size in (1, 200_000, 400_000):
        process = context.Process(target=MaskCache, args=(source,))
        process.start()
        while not partial.exists() or partial.stat().st_size < size:
            assert process.is_alive()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert partial.exists()
        assert not packed.exists()
    assert content(MaskCache(source)) == masks
    assert not partial.exists()
