"""tools/doctor.py: each failure is found, says what to do, and decides the exit status."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import doctor

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ["torch<2.14,>=2.6", "numpy>=1.26", "bitsandbytes>=0.48; extra == 'quantization'"]
LOCK = {"torch": "2.13.0", "numpy": "2.3.0"}
LOCK_FILES = sorted(ROOT.glob("requirements-py*.lock"))


def versions(**found: str) -> list[doctor.Check]:
    def installed(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    return list(doctor.check_versions(REQUIREMENTS, LOCK, installed))


def test_right_versions_pass_whatever_torch_was_built_for() -> None:
    checks = versions(torch="2.13.0+cpu", numpy="2.3.0")
    assert [(check.name, check.is_failure, check.advice) for check in checks] == [
        ("torch", False, ""),
        ("numpy", False, ""),
    ]


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ({"torch": "2.5.1", "numpy": "2.3.0"}, "pip install 'torch==2.13.0'"),  # out of range
        ({"torch": "2.12.0", "numpy": "2.3.0"}, "pip install 'torch==2.13.0'"),  # another than the lock's
        ({"numpy": "2.3.0"}, "pip install 'torch<2.14,>=2.6'"),
    ],
)
def test_wrong_versions_fail_with_the_command_that_mends_them(found: dict[str, str], advice: str) -> None:
    torch_check, numpy_check = versions(**found)
    assert torch_check.is_failure
    assert torch_check.advice == advice
    assert not numpy_check.is_failure


def test_python_outside_its_range_fails() -> None:
    assert doctor.check_python("3.10.2", ">=3.11,<3.14").is_failure
    assert not doctor.check_python("3.12.1", ">=3.11,<3.14").is_failure


def test_a_machine_without_gpu_is_reported_and_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (gpu,) = doctor.check_gpu()
    assert (gpu.found, gpu.is_failure) == ("none", False)
    assert doctor.check_quantization().is_failure  # asked for, and impossible


@pytest.mark.parametrize("usable", [True, False])
def test_a_gpu_is_named_and_must_know_bfloat16_and_nccl(monkeypatch: pytest.MonkeyPatch, usable: bool) -> None:
    gpu = SimpleNamespace(name="Card", total_memory=24 * doctor.GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: usable)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: usable)
    card, bfloat16, nccl = doctor.check_gpu()
    assert (card.found, card.is_failure) == ("Card, 24 GiB", False)
    assert bfloat16.is_failure == nccl.is_failure == (not usable)
    assert usable or "model.precision=fp32" in bfloat16.advice


def test_little_space_fails(tmp_path: Path) -> None:
    assert doctor.check_space("disk", tmp_path / "not" / "yet", 1e6, "free some").advice == "free some"
    assert not doctor.check_space("disk", tmp_path, 0.0, "").is_failure


def test_missing_weights_and_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "weights" / "LISA-7B-v1").mkdir(parents=True)
    (tmp_path / "data" / "mevis").mkdir(parents=True)
    weights = {check.name: check.is_failure for check in doctor.check_weights(tmp_path / "weights")}
    assert weights == {"weights of clip": True, "weights of llm": False, "weights of segmenter": True}
    data = {check.name: check.is_failure for check in doctor.check_data(tmp_path / "data", "refvos_s")}
    assert data == {"dataset mevis_train": False, "dataset ref_youtube_vos_train": True}
    with pytest.raises(ValueError, match=r"--mixture nothing: expected one of .*refvos_a"):
        list(doctor.check_data(tmp_path, "nothing"))


def test_the_program_prints_a_table_and_fails_with_its_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--weights", str(tmp_path)])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert re.search(r"\d+ of \d+ checks failed", out)


def test_every_supported_python_has_a_lock_that_fits_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = doctor.SpecifierSet(project["requires-python"])
    pythons = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in supported]
    assert [file.stem for file in LOCK_FILES] == [f"requirements-py{name.replace('.', '')}" for name in pythons]
    for file in LOCK_FILES:
        lock = doctor.read_lock(file)
        for requirement in map(doctor.Requirement, project["dependencies"]):
            assert lock[requirement.name] in requirement.specifier, f"{file.name}: {requirement}"
