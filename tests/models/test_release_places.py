"""Where a published checkpoint and its vision tower are found: on disk, and on Hugging Face."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from glus.models.glus import Glus
from glus.models.release import read_release
from tests.conftest import load_release, tiny_segmenter
from tests.edits import edit_json
from tests.released_layout import write_clip

OPENAI = "openai/clip-vit-large-patch14"


def clip_of(checkpoint: Path) -> str | None:
    return read_release(checkpoint, tiny_segmenter()).config.clip.weights


def test_llavas_name_of_the_vision_tower_will_do(released_copy: Path) -> None:
    file = released_copy / "config.json"
    file.write_text(file.read_text().replace('"vision_tower"', '"mm_vision_tower"'))
    assert clip_of(released_copy) == str(released_copy.parent / "clip")


@pytest.mark.parametrize("where", ["beside", "inside", "absolute"])
def test_the_named_clip_is_found(released_copy: Path, tmp_path: Path, where: str) -> None:
    parent = {"beside": released_copy.parent, "inside": released_copy, "absolute": tmp_path}[where]
    target = (released_copy.parent / "clip").rename(parent / "tower")
    named = str(target) if where == "absolute" else "tower"
    edit_json(released_copy / "config.json", lambda content: content.update(vision_tower=named))
    assert clip_of(released_copy) == str(target)


def test_a_whole_clip_keeps_its_vision_sizes_apart(released_copy: Path) -> None:
    file = released_copy.parent / "clip" / "config.json"
    file.write_text(json.dumps({"projection_dim": 7, "vision_config": json.loads(file.read_text())}))
    assert load_release(released_copy, tiny_segmenter()).config.model.clip.architecture["hidden_size"] == 32


def test_another_clip_can_be_given(released_copy: Path, tmp_path: Path, merged_glus: Glus) -> None:
    edit_json(released_copy / "config.json", lambda content: content.update(vision_tower="/where/the/authors/had/it"))
    with pytest.raises(FileNotFoundError, match=r"config\.json: vision_tower=/where/the/authors.*--clip"):
        load_release(released_copy, tiny_segmenter())
    write_clip(tmp_path / "mine", merged_glus)
    assert load_release(released_copy, tiny_segmenter(), clip=str(tmp_path / "mine")).glus.mllm.clip.width == 32
    with pytest.raises(FileNotFoundError, match=r"clip=.*absent: no such folder"):
        load_release(released_copy, tiny_segmenter(), clip=str(tmp_path / "absent"))


def test_a_hub_id_is_downloaded_without_code(
    released: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, merged_glus: Glus
) -> None:
    asked = {}

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked[repository] = allow_patterns
        return str({"authors/GLUS-A": released, OPENAI: released.parent / "clip"}[repository])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = load_release("authors/GLUS-A", tiny_segmenter(), clip=OPENAI)
    torch.testing.assert_close(loaded.glus.state_dict(), merged_glus.state_dict(), rtol=0, atol=0)
    assert list(asked) == ["authors/GLUS-A", OPENAI]
    files = ["config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin", "modeling_glus.py", "train.sh"]
    for patterns in asked.values():
        assert [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)] == files[:3]


def test_a_vision_tower_may_be_a_hub_id(released_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(released_copy / "config.json", lambda content: content.update(vision_tower=OPENAI))
    towers = {OPENAI: str(released_copy.parent / "clip")}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: towers[repository])
    assert clip_of(released_copy) == towers[OPENAI]


def test_a_place_on_the_authors_machine_is_known_by_its_name(
    released_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Since programs that take the checkpoint as it is have nowhere to name another."""
    named = "/data/somebody/clip-vit-large-patch14"
    edit_json(released_copy / "config.json", lambda content: content.update(vision_tower=named))
    towers = {OPENAI: str(released_copy.parent / "clip")}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: towers[repository])
    assert clip_of(released_copy) == towers[OPENAI]
    assert f"vision_tower={named} is not here, and taken for {OPENAI}" in caplog.text


def test_a_failed_download_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = r"weights=nobody/nothing: no such folder, and its download.*no network"
    with pytest.raises(FileNotFoundError, match=message):
        load_release("nobody/nothing", tiny_segmenter())


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("weights/GLUS-A", "/weights/GLUS-A", "GLUS-A", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"weights={name}: no such folder"):
            load_release(name, tiny_segmenter())
