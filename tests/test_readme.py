"""Every command of the README is read from it and run: small where it runs, as a dry run where it launches."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from glus.pictures import write_movie
from tests.programs import ROOT, run

TINY = {
    "tools/make_shapes.py": ["--train-videos", "3", "--valid-videos", "2", "--num-frames", "8"],
    "tools/pretrain_towers.py": ["num_scenes=3", "num_frames=8", "clip_steps=1", "sam2_steps=1", "llm_steps=1",
                               "clip_batch_size=2", "llm_batch_size=2"],
    "scripts/train.py": ["trainer.steps=1", "trainer.global_batch_size=1", "trainer.micro_batch_size=1",
                         "trainer.eval_videos=1", "data.num_workers=0"],
    "scripts/predict.py": [],
    "scripts/score_frames.py": [],
    "scripts/score.py": [],
    "scripts/compare.py": [],
    "scripts/show.py": ["num_videos=1", "num_expressions=1"],
    "scripts/segment_video.py": [],
    "tools/export.py": [],
    "tools/plan.py": [],
    "tools/check_data.py": [],
    "tools/doctor.py": [],
    "scripts/submit.py": [],
}  # fmt: skip
"""Program -> what makes its command small."""
COMPOSED = ("glus_s", "glus_a", "mevis_valid_u", "mevis_valid")
"""Commands that name these need data nobody can download here: their configuration is composed, nothing is run."""
RUN_ELSEWHERE = ("tools/check_parity.py", "tools/qualify.py")
"""Minutes long: tests/parity and tests/test_qualify.py run what the commands run."""


def commands() -> list[str]:
    """Lines of all bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def python_blocks() -> list[str]:
    """What stands in Python blocks."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def program(command: str) -> str:
    """The script of a command, such as scripts/train.py."""
    return next(word for word in shlex.split(command) if word.endswith((".py", ".sh")))


def arguments(command: str) -> list[str]:
    """What follows the script."""
    words = shlex.split(command)
    return words[words.index(program(command)) + 1 :]


def is_composed(command: str) -> bool:
    """Whether the command is for data and weights that nobody can download here."""
    return any(re.search(rf"\b{name}\b", command) for name in COMPOSED)


def check(command: list[str], folder: Path) -> None:
    """Run it."""
    done = run(*command, folder=folder, HF_HUB_OFFLINE="1", HYDRA_FULL_ERROR="1")
    as_it_should = done.returncode == 0
    if command[-1].endswith("doctor.py"):  # which may find fault with this machine
        as_it_should = re.search(r"\d+ (checks passed|of \d+ checks failed)", done.stdout) is not None
    assert as_it_should, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_every_program_is_known() -> None:
    assert commands()[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    for command in commands():
        assert (ROOT / program(command)).is_file(), command
        assert program(command).endswith(".sh") or program(command) in (*TINY, *RUN_ELSEWHERE), command


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_parse(script: str) -> None:
    check(["bash", "-n", str(ROOT / "scripts" / script)], ROOT)


@pytest.mark.parametrize("command", [c for c in commands() if is_composed(c) and program(c) in TINY])
def test_full_size_commands_compose(command: str, tmp_path: Path) -> None:
    check([sys.executable, str(ROOT / program(command)), *arguments(command), "--cfg", "job", "--resolve"], tmp_path)


@pytest.mark.parametrize("command", [c for c in commands() if "/launch_" in c])
def test_launchers_run_dry(command: str, tmp_path: Path) -> None:
    check(["bash", "-c", f"DRY_RUN=1 {command.replace('scripts/launch', str(ROOT / 'scripts/launch'))}"], tmp_path)


def test_small_commands_run_in_order(tmp_path: Path) -> None:
    """The others, as a user would run them one after another, in an empty folder."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "quickstart").symlink_to(".")  # as if the quickstart had left its model there
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    frames = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), dtype=np.uint8)
    write_movie(tmp_path / "my_video.mp4", frames, frames_per_second=3)
    small = [c for c in commands() if program(c) in TINY and not is_composed(c)]
    order = ["make_shapes", "pretrain_towers", "experiment=shapes"]  # what the others need
    small.sort(key=lambda c: next((i for i, name in enumerate(order) if name in c), len(order)))
    for block in python_blocks():
        check([sys.executable, "-c", block], tmp_path)
    for command in small:
        check([sys.executable, str(ROOT / program(command)), *arguments(command), *TINY[program(command)]], tmp_path)
    assert (tmp_path / "outputs" / "shapes" / "summary.json").is_file()
    for folder in ("my_video", "in_python"):
        assert (tmp_path / "outputs" / folder / "summary.json").is_file()
