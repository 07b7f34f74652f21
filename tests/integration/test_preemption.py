"""A scheduler's signal, sent to a launcher or to what it launched: saved, ended, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from glus.tokens import Vocabulary
from glus.train.resume import list_checkpoints

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300


@pytest.fixture
def start(shapes_folder: Path, tiny_vocabulary: Vocabulary, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts, or goes on with, a long run of two processes, as the leader of a process group of its own."""
    overrides = [
        "experiment=shapes",
        "valid=null",
        *(f"model.{part}.weights=null" for part in ("clip", "llm", "segmenter")),
        f"model.llm.tokenizer={tiny_vocabulary.folder}",
        f"data.mixture.shapes.dataset.root={shapes_folder}",
        "data.num_workers=1",
        "trainer.steps=1000",
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=1",
        "trainer.log_every=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    command = ["bash", str(ROOT / "scripts/launch_multinode.sh"), str(ROOT / "scripts/train.py"), *overrides]

    def run() -> subprocess.Popen:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        node = {"NODES": "1", "GPUS": "2", "NODE_RANK": "0", "MASTER": "127.0.0.1", "PORT": str(port)}
        env = {**os.environ, **node, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "log").open("a") as log:
            options = {"env": env, "cwd": tmp_path, "stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, start_new_session=True, **options)

    yield run
    for process in processes_of(tmp_path / "run"):
        os.kill(process, signal.SIGKILL)


def processes_of(run: Path) -> list[int]:
    """Launchers, ranks and loaders whose command line names a run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found += [int(file.parent.name)] if f"output_dir={run}".encode() in file.read_bytes() else []
    return found


def children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.is_file() else []


def wait(condition: Callable[[], object], log: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_signals_to_launcher_and_processes_save_and_go_on(start: Callable, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    to_group, to_processes = os.killpg, lambda launcher, number: [os.kill(pid, number) for pid in children(launcher)]
    for send, number in ((to_group, signal.SIGUSR1), (to_processes, signal.SIGUSR1), (to_group, signal.SIGTERM)):
        launcher, before = start(), len(steps(run))
        wait(lambda before=before: len(steps(run)) > before, log)
        assert len(children(launcher.pid)) == 2
        send(launcher.pid, number)
        launcher.wait(timeout=PATIENCE_SECONDS)
        assert not processes_of(run)
        done = steps(run)
        assert done == list(range(1, len(done) + 1))  # one curve, without gaps or repetitions
        assert [path.name for path in list_checkpoints(run)][-1] == f"step_{done[-1]}"
        assert f"stopped by {number.name} after step {done[-1]}, saved" in log.read_text()
    assert done[-1] < 1000
    resumed = json.loads((run / "run.json").read_text())["resumed"]
    assert len(resumed) == 2
