"""The programs: what they print, write and return."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from glus.config import DatasetConfig
from glus.data.masks import pack_paths
from tests.edits import edit_json
from tests.programs import run_program


@pytest.fixture
def run(dataset: DatasetConfig, tmp_path: Path):
    """Runs a program of ``scripts/`` on the tiny benchmark, in an empty folder, with the given overrides."""
    groups = tmp_path / "configs"
    for name, content in (
        ("paths/default", {"data": "data", "weights": "weights", "outputs": "outputs"}),
        (
            "dataset/tiny",
            {"name": "tiny", "layout": "mevis", "root": dataset.root, "split": "valid", "groups": "kinds.json"},
        ),
        ("dataset/shapes_valid", {"name": "none"}),
        ("dataset/mevis_valid", {"name": "none"}),
    ):
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / f"{name}.yaml").write_text(yaml.safe_dump(content))
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def run_script(script: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        arguments = ("dataset=tiny", *overrides, f"hydra.searchpath=[file://{groups}]")
        return run_program(f"scripts/{script}", *arguments, folder=cwd)

    return run_script


def test_score(run, perfect: Path, tmp_path: Path) -> None:
    good = run("score.py", f"predictions={perfect}", "output=report")
    assert good.returncode == 0, good.stderr
    assert "J&F seen" in good.stdout
    assert json.loads((tmp_path / "cwd/report/report.json").read_text())["mean_over_sentences"]["jf"] == 100
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["report"]  # Hydra leaves nothing behind

    (perfect / "b/0/00000.png").unlink()
    incomplete = run("score.py", f"predictions={perfect}", "num_workers=1")
    assert incomplete.returncode == 1
    assert "00000.png is missing" in incomplete.stdout
    assert json.loads((perfect / "report.json").read_text())["mean_over_sentences"]["num_incomplete"] == 1

    strict = run("score.py", f"predictions={perfect}", "missing=error")
    assert strict.returncode == 1
    assert "\nerror: tiny/b/0, frame 00000" in f"\n{strict.stderr}"
    assert "Traceback" not in strict.stderr


def test_every_job_of_a_sweep_scores_into_a_folder_of_its_own(run, perfect: Path, tmp_path: Path) -> None:
    (perfect / "b/0/00000.png").unlink()
    done = run("score.py", "hydra.mode=MULTIRUN", f"predictions={perfect}", "missing=drop,error,zero", "num_workers=1")
    assert done.returncode == 1
    assert "\nerror: tiny/b/0, frame 00000" in f"\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    reports = {path.parent.name: json.loads(path.read_text()) for path in perfect.rglob("report.json")}
    assert {number: report["missing"] for number, report in reports.items()} == {"0": "drop", "2": "zero"}
    done = run("score.py", "hydra.mode=MULTIRUN", f"predictions={perfect},{tmp_path / 'nowhere'}", "num_workers=1")
    assert done.returncode == 1
    assert "\nerror: no folder of predictions" in f"\n{done.stderr}"
    assert (perfect / "report.json").is_file(), "folders that differ are written to as they are"


def test_several_splits_are_scored_by_one_command(run, dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    shutil.copytree(perfect, tmp_path / "all" / "tiny")
    edit_json(Path(dataset.root) / "valid/mask_dict.json", lambda masks: masks["2"].append(None))  # of video b
    done = run("score.py", "dataset=[tiny,mevis_valid]", f"predictions={tmp_path / 'all'}", "num_workers=1")
    assert done.returncode == 1
    assert "HYDRA" not in done.stdout
    assert re.search(
        r"tiny +2 of 2 +4 +100.00 +100.00 +100.00 +0 +1 *\n +mevis_valid +- .* not scored +- *\n", done.stdout
    )
    assert (tmp_path / "all/tiny/report.json").is_file()
    assert not list((tmp_path / "cwd").iterdir())


def test_compare(run, perfect: Path, tmp_path: Path) -> None:
    result = run("compare.py", f"predictions={{ours: {perfect}, theirs: {perfect}}}", "output=out/comparison.json")
    assert result.returncode == 0, result.stderr
    assert "J&F of ours" in result.stdout
    summary = json.loads((tmp_path / "cwd/out/comparison.json").read_text())
    assert list(summary) == [
        "appearance",
        "multi",
        "absent",
        "mean_over_kinds",
        "mean_over_kinds_but_absent",
        "other_models",
    ]
    assert list(summary["other_models"]) == ["theirs"]
    assert (tmp_path / "cwd/out/comparison.csv").is_file()
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["out"]

    same = run("compare.py", f"predictions={{ours: {perfect}}}", "output=comparison.csv")
    assert same.returncode == 1
    assert "\nerror: output=comparison.csv: expected a JSON file" in f"\n{same.stderr}"

    wrong = run("compare.py", "predictions={ours: nowhere}", "output=comparison.json")
    assert wrong.returncode == 1
    assert "\nerror: no folder of predictions nowhere" in f"\n{wrong.stderr}"
    assert "Traceback" not in wrong.stderr


def test_submit(run, perfect: Path, tmp_path: Path) -> None:
    good = run("submit.py", f"predictions={perfect}", "output=out/mevis.zip")
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("out/mevis.zip: 14 masks of 5 expressions in 2 videos\n")
    with zipfile.ZipFile(tmp_path / "cwd/out/mevis.zip") as made:
        assert len(made.namelist()) == 14

    (perfect / "b/0/00000.png").unlink()
    wrong = run("submit.py", f"predictions={perfect}", "output=wrong.zip", "num_workers=1")
    assert wrong.returncode == 1
    assert f"\nerror: {perfect} cannot be submitted: 1 problems\n  tiny/b/0, frame 00000: " in f"\n{wrong.stderr}"
    assert "Traceback" not in wrong.stderr
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["out"]


def test_what_cannot_be_written_is_told_in_a_line(run, perfect: Path, tmp_path: Path) -> None:
    (tmp_path / "cwd/mevis.zip").mkdir()
    (tmp_path / "cwd/file").touch()
    for script, output in (("score.py", "file/report"), ("submit.py", "mevis.zip")):
        result = run(script, f"predictions={perfect}", f"output={output}")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(f"error: cannot write {output}: ")
        assert "Traceback" not in result.stderr


def test_masks_that_can_be_packed_nowhere(run, dataset: DatasetConfig, perfect: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    packed = pack_paths(Path(dataset.root) / "valid/mask_dict.json")[0]
    packed.unlink()
    packed.mkdir()  # as good as a folder without permission, also for root
    for script, *overrides in (("score.py", f"predictions={perfect}", "num_workers=2"), ("../tools/check_data.py",)):
        result = run(script, *overrides, "output=out")
        assert result.returncode == 1
        assert "mask_dict.json cannot be packed anywhere" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
