"""scripts/install.sh: which Python and which lock file, whatever stands there before. No package is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
case "$*" in
-c*) echo requirements-py{version}.lock ;;
--version) echo Python {version} ;;
"-m pip --version") exit {without_pip} ;;
*) echo "{name} $* ${{PIP_CONSTRAINT:-}} ${{PIP_BUILD_CONSTRAINT:-}}" >>calls ;;
esac
case "$*" in
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""
"""Stands for Python and notes what it is to do."""
INSTALL = "-m pip install --quiet --upgrade -e .[dev]"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a lock for Python 3.11 and 3.12, on a machine whose python3 is a 3.11."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "requirements-py311.lock", "requirements-py312.lock"):
        (tmp_path / name).write_text(name)
    place_python(tmp_path / "system" / "python3", "311")
    return tmp_path


def place_python(file: Path, version: str, without_pip: bool = False) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(PYTHON.format(version=version, without_pip=int(without_pip), name=file.parents[1].name.strip(".")))
    file.chmod(0o755)


def install(checkout: Path, **env: str) -> tuple[list[str], str]:
    """What Python was asked for, and what was said."""
    (checkout / "calls").unlink(missing_ok=True)
    env = {**os.environ, "PATH": f"{checkout / 'system'}:{os.environ['PATH']}", **env}
    done = subprocess.run(["bash", checkout / "scripts" / "install.sh"], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    calls = (checkout / "calls").read_text().splitlines() if (checkout / "calls").is_file() else []
    return calls, done.stderr


def test_a_fresh_machine_gets_what_its_lock_names_once(checkout: Path) -> None:
    calls, _ = install(checkout)
    assert [call.partition(" ")[2].strip() for call in calls] == [
        "-m venv --clear .venv",
        f"{INSTALL} requirements-py311.lock requirements-py311.lock",
    ]
    assert install(checkout)[0] == []
    (checkout / "requirements-py311.lock").write_text("newer")
    assert len(install(checkout)[0]) == 1


def test_the_newest_is_taken_where_asked_for_and_the_lock_again_afterwards(checkout: Path) -> None:
    install(checkout)
    for install_from, lock in (("latest", "/dev/null"), ("locked", "requirements-py311.lock")):
        (call,) = install(checkout, INSTALL=install_from)[0]
        assert call.endswith(f"{INSTALL} {lock} {lock}")


@pytest.mark.parametrize("without_pip", [False, True])
def test_an_environment_that_is_there_keeps_its_python(checkout: Path, without_pip: bool) -> None:
    place_python(checkout / ".venv" / "bin" / "python", "312", without_pip)
    calls, _ = install(checkout)
    assert ["ensurepip" in call for call in calls] == [True, False][not without_pip :]
    assert calls[-1] == f"venv {INSTALL} requirements-py312.lock requirements-py312.lock"


def test_a_python_without_a_lock_is_told_what_to_do(checkout: Path) -> None:
    (checkout / "requirements-py311.lock").unlink()
    calls, said = install(checkout)
    assert calls == []
    assert said == (
        "error: no requirements-py311.lock for Python 311 (python3): use Python 3.11, 3.12 or 3.13, or INSTALL=latest\n"
    )
    assert "expected locked or latest" in install(checkout, INSTALL="newest")[1]
