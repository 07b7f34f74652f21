"""A scheduler's signal, sent to a launcher or to what it launched: saved, ended, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from glus.train.checkpoint import list_checkpoints
from glus.train.guards import EXIT_PREEMPTED
from tests.programs import ROOT, free_port

PATIENCE_SECONDS = 300
SRUN = """#!/usr/bin/env bash
# Starts two tasks with SLURM's variables, passes SIGUSR1 on, and ends with the highest exit status.
shift # --kill-on-bad-exit=1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 "$@" &
  tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
status=0
for task in "${tasks[@]}"; do
  code=0
  while wait "$task" || code=$?; kill -0 "$task" 2>/dev/null; do code=0; done
  [ "$code" -le "$status" ] || status=$code
done
exit "$status"
"""
"""In the place of SLURM's, which is not here."""
Start = Callable[[list[str], dict[str, str]], subprocess.Popen]


@pytest.fixture
def training(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """A program and its arguments: a long run of the tiny model into ``run``."""
    run = ("data.num_workers=1", "trainer.steps=1000", f"output={tmp_path / 'run'}")
    sizes = ("trainer.global_batch_size=2", "trainer.micro_batch_size=1")
    return [str(ROOT / "scripts/train.py"), *tiny_overrides, *run, *sizes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command as the leader of a process group, and waits until its run is a step further."""

    def run(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
        before = len(steps(tmp_path / "run"))
        env = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "log").open("a") as log:
            options = {"env": env, "cwd": tmp_path, "stdout": log, "stderr": subprocess.STDOUT}
            launcher = subprocess.Popen(command, start_new_session=True, **options)
        end = time.monotonic() + PATIENCE_SECONDS
        while len(steps(tmp_path / "run")) == before:
            is_waiting = launcher.poll() is None and time.monotonic() < end
            assert is_waiting, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        return launcher

    yield run
    for process in processes_of(tmp_path / "run"):
        os.kill(process, signal.SIGKILL)


def processes_of(run: Path) -> list[int]:
    """Launchers, ranks and loaders whose command line names a run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found += [int(file.parent.name)] if f"output={run}".encode() in file.read_bytes() else []
    return found


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.is_file() else []


def check_saved(folder: Path, number: signal.Signals, continuations: int) -> None:
    """Nobody is left, the last step that was recorded is saved, and the records are one curve."""
    assert not processes_of(folder / "run")
    done = steps(folder / "run")
    assert done == list(range(1, len(done) + 1))
    assert done[-1] < 1000
    assert list_checkpoints(folder / "run")[-1].name == f"step_{done[-1]}"
    assert f"stopped by {number.name} after step {done[-1]}, saved" in (folder / "log").read_text()
    about = json.loads((folder / "run" / "run.json").read_text())
    assert about["world_size"] == 2
    assert len(about.get("resumed", [])) == continuations


@pytest.mark.slow
def test_signals_to_torchrun_and_to_its_processes(training: list[str], start: Start, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/launch_multinode.sh"), *training]
    to_group, to_processes = os.killpg, lambda launcher, number: [os.kill(pid, number) for pid in children(launcher)]
    signals = ((to_group, signal.SIGUSR1), (to_processes, signal.SIGUSR1), (to_group, signal.SIGTERM))
    for count, (send, number) in enumerate(signals):
        node = {"NODES": "1", "GPUS": "2", "NODE_RANK": "0", "MASTER": "127.0.0.1", "PORT": str(free_port())}
        launcher = start(command, {**node, "PYTHON": sys.executable})
        assert len(children(launcher.pid)) == 2
        send(launcher.pid, number)
        launcher.wait(timeout=PATIENCE_SECONDS)
        check_saved(tmp_path, number, count)


@pytest.mark.slow
def test_a_slurm_job_shortly_before_its_end(training: list[str], start: Start, tmp_path: Path) -> None:
    """The job script that ``launch_slurm.sh`` submits, below commands that do what SLURM's do."""
    (tmp_path / "bin").mkdir()
    for name, script in {"srun": SRUN, "scontrol": "#!/usr/bin/env bash\necho 127.0.0.1\n"}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    settings = {"NODES": "1", "GPUS": "2", "DRY_RUN": "1", "PYTHON": sys.executable}
    printed = subprocess.run(
        ["bash", str(ROOT / "scripts/launch_slurm.sh"), *training],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "job.sh").write_text(printed.stdout)
    for continuations in range(2):
        job = {"SLURM_JOB_ID": str(free_port() % 20000), "SLURM_JOB_NODELIST": "here"}
        launcher = start(
            ["bash", str(tmp_path / "job.sh")], {**job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        )
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(timeout=PATIENCE_SECONDS) == EXIT_PREEMPTED
        check_saved(tmp_path, signal.SIGUSR1, continuations)
