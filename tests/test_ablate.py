"""The program behind an ablation: which tasks it has, that they run once each, and go on after a kill."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import AblateConfig, load_config
from glus.shapes.scene import KINDS
from tests.programs import ROOT, run_program

sys.path.insert(0, str(ROOT / "scripts"))
import ablate

PROGRAM = """
import pathlib, sys, time
file, *needed = map(pathlib.Path, sys.argv[1:])
assert all(other.is_file() for other in needed), "comes too early"
time.sleep(0.05)
with file.open("a") as out:
    out.write("ran")
"""


def config_of(*overrides: str) -> AblateConfig:
    ConfigStore.instance().store("schema", AblateConfig)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return load_config(AblateConfig, compose("ablate", list(overrides)))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "ablation").glob("*.yaml")))
def test_rows_differ_by_what_they_say(name: str, tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    config = config_of(f"ablation={name}", "output=out", f"dataset.root={tmp_path}")
    assert {claim.kind for claim in config.ablation.claims} <= {*KINDS, "mean"}
    tasks = {task.folder: task for task in ablate.plan_tasks(config)}
    rows = config.ablation.rows
    own_starts = {row: Path("out") / row / "start" for row, settings in rows.items() if settings.pretrain}
    assert len(tasks) == 1 + 2 * len(own_starts) + 3 * (len(rows) + sum(row.of is None for row in rows.values()))
    shared = Path("out/start")
    for row, folder in own_starts.items():
        (command,), (before,) = tasks[folder].commands, tasks[shared].commands
        tower = folder.with_name("tower")
        own = {*rows[row].train, f"model.llm.weights={tower / 'llm'}", f"output={folder / 'run'}"}
        assert set(command) == {*before, *own} - {f"output={shared / 'run'}"}
        assert tasks[folder].needs == (tower,)
        assert {*rows[row].pretrain, "parts=[llm]", f"output={tower}"} < set(*tasks[tower].commands)
    for row, settings in rows.items():
        for seed in (0, 1, 2):
            folder = Path("out") / row / f"seed_{seed}"
            (training,) = tasks[folder].needs
            assert training == Path("out") / (settings.of or row) / f"seed_{seed}" / "training"
            (command,) = tasks[training].commands
            start = own_starts.get(settings.of or row, shared)
            assert tasks[training].needs == (start,)
            assert f"model.weights={start / 'run' / 'checkpoints' / 'step_600'}" in command
            tower = f"model.llm.weights={start.with_name('tower') / 'llm'}"
            assert (tower in command) == bool(rows[settings.of or row].pretrain)
            own = {f"trainer.seed={seed}", f"output={training / 'run'}", *rows[settings.of or row].train}
            assert own <= set(command)
            others = {override for other in rows.values() for override in other.train} - own
            assert not others & set(command)
            assert set(settings.predict) <= set(tasks[folder].commands[-1])


def test_an_ablation_has_rows() -> None:
    with pytest.raises(ValueError, match=r"ablation\.rows=\{\}: expected at least one row"):
        config_of("output=out", "ablation=[]")


def test_missing_shapes_are_made_first_and_the_shipped_towers_are_found(tmp_path: Path) -> None:
    data, tower, own_start, start, training, *_ = ablate.plan_tasks(config_of("output=out", f"dataset.root={tmp_path}"))
    assert data.commands == (("tools/make_shapes.py", str(tmp_path)),)
    assert (data.needs, tower.needs, start.needs) == ((), (), (data.folder,))
    assert own_start.needs == (data.folder, tower.folder)
    assert training.needs == (start.folder,)
    assert f"paths.weights={ROOT / 'assets' / 'glus_towers'}" in start.commands[0]


def test_a_given_start_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    tasks = ablate.plan_tasks(config_of("start=glus_shapes", "output=out", "seeds=[4]", f"dataset.root={tmp_path}"))
    others = [task.folder for task in tasks if task.folder.name not in ("seed_4", "training")]
    assert others == [Path("out/exchanged/tower"), Path("out/exchanged/start")]
    training = next(task for task in tasks if task.folder.name == "training")
    assert f"model.weights={ROOT / 'assets' / 'glus_shapes'}" in training.commands[0]


def tasks_of(folder: Path, number: int = 4) -> list[ablate.Task]:
    """Each needs the one before."""
    (folder / "program.py").write_text(PROGRAM)
    files = [folder / f"file_{n}" for n in range(number)]
    return [
        ablate.Task(
            folder / f"task_{n}",
            (folder / f"task_{n - 1}",) if n else (),
            ((str(folder / "program.py"), str(files[n]), *map(str, files[max(0, n - 1) : n])),),
        )
        for n in range(number)
    ]


def test_every_task_runs_once_when_what_it_needs_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with two commands at work."""
    monkeypatch.setattr(ablate, "SECONDS_UNTIL_NEXT_LOOK", 0.01)
    tasks = tasks_of(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(ablate.run_tasks, tasks, 2, 0) for _ in range(2)]:
            done.result()
    assert [(tmp_path / f"file_{n}").read_text() for n in range(4)] == ["ran"] * 4


def test_a_failure_is_shown_and_the_same_command_goes_on(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, 2)
    (tmp_path / "program.py").write_text(PROGRAM.replace("time.sleep(0.05)", "assert file.name == 'file_0', 'why'"))
    with pytest.raises(ChildProcessError, match=r"(?s)failed, see .*task_1/log\.txt:.*why"):
        ablate.run_tasks(tasks, 1, 0)
    (tmp_path / "program.py").write_text(PROGRAM)
    ablate.run_tasks(tasks, 1, 0)
    assert [(tmp_path / f"file_{n}").read_text() for n in range(2)] == ["ran"] * 2
    other = [ablate.Task(tasks[0].folder, (), ((*tasks[0].commands[0], "seed=1"),))]
    with pytest.raises(ValueError, match=r"task_0 was made otherwise \(seed=1\)"):
        ablate.run_tasks(other, 1, 0)


TINY = """
rows:
  a: {train: [model.memory.enabled=false]}
  b: {of: a, start: middle, against: a}
claims:
  - {worse: a, better: b, kind: late}
"""


@pytest.mark.slow
def test_an_ablation_from_data_to_page(tmp_path: Path) -> None:
    """Two rows of one seed from the shipped model, and once more, when nothing is left to do."""
    (tmp_path / "configs" / "ablation").mkdir(parents=True)
    (tmp_path / "configs" / "ablation" / "tiny.yaml").write_text(TINY)
    videos = ("--train-videos", "7", "--valid-videos", "7")
    made = run_program("tools/make_shapes.py", "data/shapes", *videos, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    place = f"hydra.searchpath=[file://{tmp_path / 'configs'}]"
    settings = ("ablation=tiny", "start=glus_shapes", "seeds=[0]", "steps=1", place)
    for _ in range(2):
        done = run_program("scripts/ablate.py", *settings, folder=tmp_path)
        assert "a -> b on late:" in done.stdout, done.stderr
    output = tmp_path / "outputs" / "ablation"
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == {"a", "b"}
    assert set(summary["b"]) == {*KINDS, "mean"}
    assert {"mean", "sd", "difference", "low", "high"} <= set(summary["b"]["late"])
    assert "Claims" in (output / "ablation.html").read_text()
