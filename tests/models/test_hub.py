"""weights= by name: what is converted, when, and that nothing else is."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from glus.models.glus import Glus
from glus.models.hub import find_model
from glus.models.pretrained import load_model
from tests.conftest import tiny_segmenter
from tests.programs import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "glus" / "models"


def test_a_published_checkpoint_is_converted_once(
    merged_glus: Glus, released_copy: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = find_model(released_copy, tiny_segmenter())
    assert folder.parent == cache
    assert caplog.text.count("is converted once, into") == 1
    torch.testing.assert_close(load_model(folder).glus.state_dict(), merged_glus.state_dict(), rtol=0, atol=0)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_model(released_copy, tiny_segmenter()) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (released_copy / "config.json").touch()  # another file, another model
    assert find_model(released_copy, tiny_segmenter()) != folder


def test_a_user_without_a_home_is_told_what_to_set(
    released_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no folder that is called ~ is made."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: str(path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"no home folder .*set XDG_CACHE_HOME"):
        find_model(released_copy, tiny_segmenter())
    assert not (tmp_path / "~").exists()


def test_an_id_on_the_hub_is_downloaded_without_its_code(
    released_copy: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(released_copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = find_model("owner/GLUS-A", tiny_segmenter())
    assert folder.name.startswith("GLUS-A-")
    ((name, patterns),) = asked
    assert name == "owner/GLUS-A"
    assert not [pattern for pattern in patterns if pattern.endswith((".py", "*"))]
    shutil.rmtree(released_copy)
    shutil.copytree(folder, released_copy)  # an export of ours on the hub needs no conversion
    assert find_model("owner/ours", tiny_segmenter()) == released_copy


def test_folders_of_ours_are_taken_as_they_are(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = ROOT / "assets" / "glus_shapes"
    assert find_model(shipped) == shipped
    monkeypatch.chdir(tmp_path)
    assert find_model("glus_shapes") == shipped
    run = tmp_path / "run" / "checkpoints" / "step_3"
    shutil.copytree(shipped, run)
    assert find_model(tmp_path / "run") == run
    (run.parent / "best").symlink_to(run.name)
    assert find_model("run/checkpoints/best") == run
    assert not cache.exists()
    with pytest.raises(FileNotFoundError, match=r"weights=nowhere: no such folder"):
        find_model("nowhere")
