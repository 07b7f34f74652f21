"""tools/doctor.py: each failure is found, says what to do, and decides the exit status."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.programs import run
from tools import doctor

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ["torch<2.14,>=2.6", "numpy>=1.26", "bitsandbytes>=0.48; extra == 'quantization'"]
LOCK = {"torch": "2.13.0", "numpy": "2.3.0"}
LOCK_FILES = sorted(ROOT.glob("requirements-py*.lock"))


def versions(**found: str) -> list[doctor.Finding]:
    def installed(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    return list(doctor.check_versions(REQUIREMENTS, LOCK, installed))


def test_right_versions_pass_whatever_torch_was_built_for() -> None:
    checks = versions(torch="2.13.0+cpu", numpy="2.3.0")
    assert [(check.name, check.verdict, check.advice) for check in checks] == [("torch", "ok", ""), ("numpy", "ok", "")]


@pytest.mark.parametrize(
    ("found", "verdict", "advice"),
    [
        ({"torch": "2.5.1"}, "FAIL", "pip install 'torch==2.13.0'"),
        ({}, "FAIL", "pip install 'torch<2.14,>=2.6'"),
        ({"torch": "2.12.0+cu126"}, "note", "supported; pip install 'torch==2.13.0' is what was tested"),
        ({"torch": "2.11.0a0+container"}, "note", "supported; pip install 'torch==2.13.0' is what was tested"),
    ],
)
def test_other_versions_fail_outside_the_range_and_are_noted_inside(
    found: dict[str, str], verdict: str, advice: str
) -> None:
    """B10."""
    torch_check, numpy_check = versions(numpy="2.3.0", **found)
    assert (torch_check.verdict, torch_check.advice) == (verdict, advice)
    assert numpy_check.verdict == "ok"


def test_without_a_lock_the_range_alone_counts() -> None:
    (check, *_) = doctor.check_versions(REQUIREMENTS, {}, lambda name: "2.7.0")
    assert check.verdict == "ok"


def test_python_outside_its_range_fails() -> None:
    assert doctor.check_python("3.10.2", ">=3.11,<3.14").verdict == "FAIL"
    assert doctor.check_python("3.12.1", ">=3.11,<3.14").verdict == "ok"


def test_a_machine_without_gpu_is_reported_and_does_not_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (gpu,) = doctor.check_gpu(None, REQUIREMENTS[0])
    assert (gpu.found, gpu.verdict) == ("none", "ok")
    assert doctor.check_bitsandbytes().verdict == "FAIL"  # asked for, and impossible
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    for check in doctor.check_room(tmp_path, "refvos_s", num_gpus=0):
        assert check.verdict == "note"
        assert check.advice.startswith("for the full size only: ")


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build", "570.124.06"),
        ("something else", "of unknown version"),
    ],
)
def test_the_driver_tells_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, driver: str) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "DRIVER_FILE", tmp_path / "version")
    assert doctor.read_driver() is None
    (tmp_path / "version").write_text(f"{text}\nGCC version: gcc version 11.4.0\n")
    assert doctor.read_driver() == driver


@pytest.mark.parametrize(("answer", "driver"), [("560.35.05", "560.35.05"), ("", "of unknown version")])
def test_where_only_nvidia_smi_is_there_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, driver: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{answer}'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.read_driver() == driver


@pytest.mark.parametrize(
    ("driver", "cuda", "advice"),
    [
        ("535.129.03", "13.0", r"pip install 'torch<2.14,>=2.6' --index-url \S+/whl/cu126, or update the driver"),
        ("570.124.06", "13.0", r"/whl/cu128,"),
        ("580.65.06", None, r"/whl/cu130,"),
        ("470.1", "12.6", r"^update the driver to 525 or later"),
        ("535.129.03", "12.8", r"CUDA 12.8 fits this driver, so the GPU is hidden or broken: .*CUDA_VISIBLE_DEVICES"),
        ("of unknown version", "13.0", r"^mend the driver: nvidia-smi must name"),
    ],
)
def test_a_driver_whose_gpu_torch_cannot_use_fails_and_names_the_wheel(
    monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, advice: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (gpu,) = doctor.check_gpu(driver, REQUIREMENTS[0])
    assert gpu.verdict == "FAIL"
    assert driver in gpu.found
    assert re.search(advice, gpu.advice)


def test_shared_memory_holds_what_all_loaders_keep_ready() -> None:
    """8 GPUs x 4 workers x 2 micro-batches of 2 videos of 4 frames of 1080p with 3 masks each."""
    assert doctor.shared_memory_gib("refvos_s", 8) == pytest.approx(8 * 4 * 2 * 2 * 4 * 1080 * 1920 * 6 / 2**30)
    assert doctor.shared_memory_gib("shapes", 1) < 1


@pytest.mark.parametrize(("usable", "gib", "verdict"), [(True, 24, "ok"), (False, 24, "ok"), (True, 8, "note")])
def test_a_gpu_is_named_and_must_know_bfloat16_and_nccl(
    monkeypatch: pytest.MonkeyPatch, usable: bool, gib: int, verdict: str
) -> None:
    gpu = SimpleNamespace(name="Card", total_memory=gib * doctor.GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: usable)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: usable)
    card, bfloat16, nccl = doctor.check_gpu("570.1", REQUIREMENTS[0])
    assert (card.found, card.verdict) == (f"Card, {gib} GiB", verdict)
    assert bfloat16.verdict == nccl.verdict == ("ok" if usable else "FAIL")
    assert usable or "model.precision=fp32" in bfloat16.advice


@pytest.mark.parametrize(
    ("total_gib", "num_gpus", "verdict"), [(23.4, 0, "ok"), (15.6, 0, "note"), (256, 8, "ok"), (24, 8, "note")]
)
def test_little_memory_is_noted(total_gib: float, num_gpus: int, verdict: str) -> None:
    assert doctor.check_memory(total_gib, num_gpus).verdict == verdict


def test_little_space_fails(tmp_path: Path) -> None:
    assert doctor.check_space("disk", tmp_path / "not" / "yet", 1e6, "free some").advice == "free some"
    assert doctor.check_space("disk", tmp_path, 0.0, "").verdict == "ok"


def test_missing_weights_and_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "weights" / "LISA-7B-v1").mkdir(parents=True)
    (tmp_path / "data" / "mevis").mkdir(parents=True)
    weights = {check.name: check.verdict == "FAIL" for check in doctor.check_weights(tmp_path / "weights")}
    assert weights == {"weights of clip": True, "weights of llm": False, "weights of segmenter": True}
    data = {check.name: check.verdict == "FAIL" for check in doctor.check_data(tmp_path / "data", "refvos_s")}
    assert data == {"dataset mevis_train": False, "dataset ref_youtube_vos_train": True}
    notes = [*doctor.check_weights(tmp_path, False), *doctor.check_data(tmp_path, "refvos_s", False)]
    assert {check.verdict for check in notes} == {"note"}, "B10: looked for, and no failure unless they were asked for"
    assert notes[0].advice.startswith("hf download openai/clip-vit-large-patch14 --local-dir")
    with pytest.raises(ValueError, match=r"--mixture nothing: expected one of .*refvos_a"):
        list(doctor.check_data(tmp_path, "nothing"))


def test_a_mixture_that_extends_another_has_the_datasets_and_settings_of_both(tmp_path: Path) -> None:
    names = {check.name for check in doctor.check_data(tmp_path, "refvos_plus_image")}
    assert names >= {"dataset mevis_train", "dataset lvvis_train", "dataset refcoco_train", "dataset reason_seg_train"}
    assert doctor.shared_memory_gib("refvos_plus_image", 8) == doctor.shared_memory_gib("refvos_a", 8)


def test_the_program_prints_a_table_and_fails_with_its_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--weights", str(tmp_path), "--quantization"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "pip install 'glus[quantization]'" in out  # brackets are no markup
    assert re.search(r"\d+ of \d+ checks failed", out)


def test_a_lock_file_without_the_project_itself_is_told() -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    python, requirements, glus = doctor.read_requirements(missing)
    assert (glus.verdict, glus.advice) == ("FAIL", "pip install --no-deps -e .")
    assert doctor.read_requirements(lambda package: "1.0")[2].verdict == "ok"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (python, requirements) == (project["requires-python"], project["dependencies"])


def test_a_project_that_python_does_not_find_is_told(tmp_path: Path) -> None:
    """As where only the packages of a lock file are installed."""
    code = f"""
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "glus":
            raise ModuleNotFoundError(f"No module named {{name}}", name="glus")
sys.meta_path.insert(0, Absent())
runpy.run_path({str(ROOT / "tools/doctor.py")!r}, run_name="__main__")
"""
    done = run(sys.executable, "-c", code, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: glus itself is not installed")
    assert done.stderr.endswith("pip install --no-deps -e .\n")


@pytest.mark.parametrize(
    ("machine", "system", "has_wheel"),
    [("x86_64", "linux", True), ("aarch64", "linux", False), ("arm64", "darwin", False), ("AMD64", "win32", True)],
)
def test_decord_is_asked_for_where_it_has_wheels(machine: str, system: str, has_wheel: bool) -> None:
    """So that the rest installs on ARM, too."""
    there = {"platform_machine": machine, "sys_platform": system}
    lines = [line for file in LOCK_FILES for line in file.read_text().splitlines() if line.startswith("decord")]
    lines += tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    decord = [requirement for requirement in map(doctor.Requirement, lines) if requirement.name == "decord"]
    assert [one.marker.evaluate(there) for one in decord if one.marker] == [has_wheel] * (len(LOCK_FILES) + 1)


def test_every_supported_python_has_a_lock_that_fits_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = doctor.SpecifierSet(project["requires-python"])
    pythons = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in supported]
    assert [file.stem for file in LOCK_FILES] == [f"requirements-py{name.replace('.', '')}" for name in pythons]
    for file in LOCK_FILES:
        lock = doctor.read_lock(file)
        for requirement in map(doctor.Requirement, project["dependencies"]):
            assert lock[requirement.name] in requirement.specifier, f"{file.name}: {requirement}"
