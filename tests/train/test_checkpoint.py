"""Parts of a checkpoint: its files, where a run goes on, and what may change in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glus.config import (
    DatasetConfig,
    Layout,
    LlmConfig,
    MixtureItem,
    ModelConfig,
    Protocol,
    RecipeConfig,
    TrainConfig,
    TrainerConfig,
    plain_config,
)
from glus.losses.contrastive import ContrastiveQueue, QueueEntry, merge_entries
from glus.models.pretrained import CONFIG_FILE, TRAINED_FILE, find_model_folder
from glus.models.weight_files import SafetensorsFile
from glus.train.checkpoint import (
    STATE_FILE,
    Checkpoints,
    RunState,
    find_start,
    float32_layout,
    list_checkpoints,
    superfluous,
)
from glus.types import ObjectKey


def test_a_file_written_tensor_by_tensor_is_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "scalar": torch.tensor(7.0), "b.c": torch.randn(1, 4, 2)}
    layout = float32_layout({name: tuple(value.shape) for name, value in tensors.items()})
    file = SafetensorsFile(tmp_path / "x.safetensors", layout)
    for value in tensors.values():
        file.append(value)
    file.close()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def entries(*positions: tuple[int, int]) -> list[QueueEntry]:
    key = ObjectKey("d", "v", "0", "f", frozenset([1]))
    return [QueueEntry(position, key, torch.full((2,), float(position[0]))) for position in positions]


def test_queues_merge_in_the_order_of_samples_each_entry_once() -> None:
    """Ranks of two take turns of two samples; both hold what they got at an earlier merge."""
    first = entries((0, 0), (2, 0), (4, 0), (4, 1), (8, 0))
    second = entries((0, 0), (2, 0), (6, 0), (10, 0))
    merged = merge_entries([first, second])
    assert [entry.position for entry in merged] == [(0, 0), (2, 0), (4, 0), (4, 1), (6, 0), (8, 0), (10, 0)]
    queue = ContrastiveQueue(size=3, num_negatives=1)
    queue.push([first[0].key], torch.zeros(1, 2))
    queue.restore(merged)
    assert [entry.position for entry in queue.entries] == [(6, 0), (8, 0), (10, 0)]
    assert [float(entry.embed[0]) for entry in queue.entries] == [6, 8, 10]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A config whose trainer has the given fields."""

    def make(**trainer: object) -> TrainConfig:
        model = ModelConfig(llm=LlmConfig(vocab_size=9, tokenizer="here"))
        return TrainConfig(model, trainer=TrainerConfig(steps=9, **trainer), output=str(tmp_path / "run"))

    return make


def write_checkpoint(run: Path, step: int, config: TrainConfig, ending: str = "", score: float | None = None) -> Path:
    folder = run / "checkpoints" / f"step_{step}{ending}"
    folder.mkdir(parents=True)
    content = {
        "state": vars(RunState(step, score=score)),
        "updates": step,
        "world_size": 1,
        "config": plain_config(config),
    }
    (folder / STATE_FILE).write_text(json.dumps(content))
    return folder


def test_the_newest_complete_checkpoint_is_found(make_config: Callable, tmp_path: Path) -> None:
    config, run = make_config(), tmp_path / "run"
    assert find_start(config) is None
    for step, ending in ((9, ""), (10, ""), (11, ".tmp")):
        write_checkpoint(run, step, config, ending)
    (run / "checkpoints" / "step_12").mkdir()  # a model folder without the state of training
    assert [folder.name for folder in list_checkpoints(run)] == ["step_9", "step_10"]
    assert find_start(config) == run / "checkpoints" / "step_10"


def test_the_newest_and_the_best_are_kept(make_config: Callable, tmp_path: Path) -> None:
    for step, score in ((2, 30.0), (4, 50.0), (6, None), (8, 50.0), (10, 40.0)):
        write_checkpoint(tmp_path, step, make_config(), score=score)
    assert [folder.name for folder in superfluous(tmp_path, 1, keep_best=True)] == ["step_2", "step_6", "step_8"]
    assert [folder.name for folder in superfluous(tmp_path, 2, keep_best=False)] == ["step_2", "step_4", "step_6"]
    assert superfluous(tmp_path, 5, keep_best=True) == []


def link_best(run: Path, config: TrainConfig) -> None:
    Checkpoints(run, None, None, config, lambda folder: None)._link_best()  # type: ignore[arg-type]


def test_best_is_a_link_that_follows_and_may_be_moved_with_its_run(make_config: Callable, tmp_path: Path) -> None:
    config, run = make_config(), tmp_path / "run"
    link = run / "checkpoints" / "best"
    write_checkpoint(run, 2, config)
    link_best(run, config)
    assert not link.is_symlink()  # nothing was measured
    (run / "checkpoints" / "best.tmp").touch()  # of a run that was killed while it linked
    for step, score, expected in ((4, 30.0, 4), (6, 50.0, 6), (8, 50.0, 6), (10, 40.0, 6)):
        write_checkpoint(run, step, config, score=score)
        link_best(run, config)
        assert link.resolve() == run / "checkpoints" / f"step_{expected}"
    assert [folder.name for folder in list_checkpoints(run)] == [f"step_{step}" for step in (2, 4, 6, 8, 10)]
    moved = run.rename(tmp_path / "moved")
    folder = moved / "checkpoints" / "step_6"
    for name in (CONFIG_FILE, TRAINED_FILE):
        (folder / name).touch()
    assert find_model_folder(moved / "checkpoints" / "best") == folder  # not the link, which may turn while it is read


def test_a_file_system_without_links_ends_no_training(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    write_checkpoint(tmp_path, 2, config, score=1.0)
    monkeypatch.setattr(Path, "symlink_to", lambda *_: os.symlink("x", tmp_path / "missing" / "x"))
    link_best(tmp_path, config)
    assert "step_2 is the best so far, but" in caplog.text
    assert "checkpoints/best cannot be a link to it" in caplog.text


def test_resume_never_refuses_to_overwrite(make_config: Callable, tmp_path: Path) -> None:
    config = make_config(resume="never")
    assert find_start(config) is None
    write_checkpoint(tmp_path / "run", 4, config)
    with pytest.raises(ValueError, match=r"has checkpoints up to step_4, but trainer.resume=never: choose another"):
        find_start(config)


def test_resume_from_another_run_until_there_are_own_checkpoints(make_config: Callable, tmp_path: Path) -> None:
    config = make_config(resume=str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match=r"neither auto, never, nor a checkpoint with training.json"):
        find_start(config)
    other = [write_checkpoint(tmp_path / "other", step, config) for step in (3, 6)]
    assert find_start(config) == other[1]
    assert find_start(make_config(resume=str(other[0]))) == other[0]
    own = write_checkpoint(tmp_path / "run", 4, config)
    assert find_start(config) == own


def test_an_older_checkpoint_of_the_same_run_is_refused(make_config: Callable, tmp_path: Path) -> None:
    older, newer = (write_checkpoint(tmp_path / "run", step, make_config()) for step in (3, 6))
    with pytest.raises(ValueError, match="remove the newer checkpoints of this run first: step_6"):
        find_start(make_config(resume=str(older)))
    assert find_start(make_config(resume=str(newer))) == newer


def test_a_run_goes_on_whose_config_has_names_of_before(make_config: Callable, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", 4, make_config())
    content = json.loads((folder / STATE_FILE).read_text())
    content["config"]["output_dir"] = content["config"].pop("output")
    content["config"]["trainer"]["eval_videos"] = content["config"]["trainer"].pop("eval_max_videos")
    (folder / STATE_FILE).write_text(json.dumps(content))
    assert find_start(make_config()) == folder
    with pytest.raises(ValueError, match=r"trainer.seed=5 \(was 0\)"):  # all else is looked at
        find_start(make_config(seed=5))


@pytest.mark.parametrize("cache", [None, "cache"])
def test_a_run_of_before_the_feature_cache_went_goes_on_unless_it_used_it(
    make_config: Callable, tmp_path: Path, cache: str | None
) -> None:
    folder = write_checkpoint(tmp_path / "run", 4, make_config())
    content = json.loads((folder / STATE_FILE).read_text())
    content["config"]["data"]["feature_cache"] = {"folder": cache, "parts": ["clip"]}
    (folder / STATE_FILE).write_text(json.dumps(content))
    if cache:
        with pytest.raises(ValueError, match="feature_cache"):
            find_start(make_config())
    else:
        assert find_start(make_config()) == folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.1, "seed": 5}, r"trainer.learning_rate=0.1 \(was 0.0003\); trainer.seed=5 \(was 0\)"),
        ({"micro_batch_size": 4, "zero_stage": 3, "log_every": 1, "keep_best": None, "save_every_minutes": 9.0}, ""),
    ],
)
def test_only_what_leaves_the_result_alone_may_change(
    make_config: Callable, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    folder = write_checkpoint(tmp_path / "run", 4, make_config())
    if named:
        with pytest.raises(ValueError, match=named):
            find_start(make_config(**changes))
    else:
        assert find_start(make_config(**changes)) == folder


def test_what_is_published_may_be_told_otherwise(make_config: Callable, tmp_path: Path) -> None:
    """As a later version of configs/ does."""
    config = make_config()
    dataset = DatasetConfig("d", Layout.mevis, "here", "train")
    config.data.mixture["d"] = MixtureItem(dataset)
    folder = write_checkpoint(tmp_path / "run", 4, config)
    dataset.expected.videos, dataset.sha256, dataset.protocol = 3, {"a.json": 64 * "0"}, Protocol.revos
    config.recipe = RecipeConfig("GLUS-S", "the paper", gpu_hours=1.0, gpu_hours_source="the paper")
    assert find_start(config) == folder
    dataset.split = "valid"
    with pytest.raises(ValueError, match=r"data.mixture.d.dataset.split='valid' \(was 'train'\)\. Restore"):
        find_start(config)


def test_a_damaged_state_is_named(make_config: Callable, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", 4, make_config())
    (folder / STATE_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"step_4 is no checkpoint to go on from: training\.json"):
        find_start(make_config())


def test_names_beside_the_checkpoints_are_left_aside(make_config: Callable, tmp_path: Path) -> None:
    config, run = make_config(), tmp_path / "run"
    ours = [write_checkpoint(run, step, config) for step in (9, 10)]
    for folder in ours:
        (folder / CONFIG_FILE).touch()
        (folder / TRAINED_FILE).touch()
    others = ["2_backup", "2 (copy)", "010", "1_0", "-3", "+11", "11.5", "11.old", "best.tmp", "", "١٢"]
    for name in others:
        shutil.copytree(ours[0], run / "checkpoints" / f"step_{name}")
    (run / "checkpoints" / "step_100.zip").touch()
    (run / "checkpoints" / "step_101").touch()
    (run / "checkpoints" / "step_102").mkdir()
    (run / "checkpoints" / "step_103").symlink_to(tmp_path / "gone")
    (run / "checkpoints" / "step_best").symlink_to(ours[0])
    assert list_checkpoints(run) == ours
    assert find_start(config) == find_model_folder(run) == ours[1]
    assert superfluous(run, 1, keep_best=False) == ours[:1]
    with pytest.raises(ValueError, match="remove the newer checkpoints of this run first: step_10"):
        find_start(make_config(resume=str(run / "checkpoints" / "step_best")))
    other = shutil.copytree(run / "checkpoints" / "step_2_backup", tmp_path / "step_2_backup")
    assert find_start(make_config(resume=str(other))) == ours[1]
    assert find_model_folder(other) == other


def test_only_what_the_run_left_itself_is_removed(make_config: Callable, tmp_path: Path) -> None:
    config, run = make_config(keep_last=1), tmp_path / "run"
    moved = shutil.move(write_checkpoint(run, 1, config), tmp_path / "elsewhere")
    (run / "checkpoints" / "step_1").symlink_to(moved)
    for step, ending in ((2, ""), (3, ""), (3, ".tmp"), (2, ".removed.tmp"), (2, "_backup.tmp")):
        write_checkpoint(run, step, config, ending)
    (run / "checkpoints" / "notes.tmp").touch()
    checkpoints = Checkpoints(run, None, None, config, lambda folder: None)  # type: ignore[arg-type]
    checkpoints._start(run / "checkpoints" / "step_4.tmp")
    checkpoints._prune()
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step_1", "step_3", "step_4.tmp", "step_2_backup.tmp", "notes.tmp"}
    assert (moved / STATE_FILE).is_file()


def test_what_cannot_be_removed_yet_ends_no_training(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where another process predicts with an older checkpoint; the new one is complete."""
    config, run = make_config(keep_last=1), tmp_path / "run"
    for step in (1, 2):
        write_checkpoint(run, step, config)

    def busy(folder: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    checkpoints = Checkpoints(run, None, None, config, lambda folder: None)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        checkpoints._prune()
        checkpoints._start(run / "checkpoints" / "step_3.tmp")
    for name in ("step_1", "step_1.removed.tmp"):
        assert f"checkpoints/{name} cannot be removed yet: [Errno 39] Directory not empty" in caplog.text
    assert [folder.name for folder in list_checkpoints(run)] == ["step_2"]
    checkpoints._start(run / "checkpoints" / "step_4.tmp")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_2", "step_4.tmp"}
