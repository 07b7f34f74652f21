"""The launchers: what they would start, and two nodes of two processes that really train."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from glus.models.pretrained import load_model
from tests.programs import ROOT, free_port

TRAIN = ["scripts/train.py", "experiment=glus_s", "hardware=nodes4", "output=a folder"]


def launch(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", **settings}
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_torchrun_on_each_node() -> None:
    done = launch("launch_multinode.sh", *TRAIN, NODES="4", GPUS="4", NODE_RANK="2", MASTER="node0", PORT="1234")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    options = ["--nnodes 4", "--nproc_per_node 4", "--node_rank 2", "--master_addr node0", "--master_port 1234"]
    assert " ".join(words[3:-4]) == " ".join(options)
    assert words[-4:] == TRAIN


def test_deepspeed_with_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node0 slots=4\nnode1 slots=4\n")
    done = launch("launch_multinode.sh", *TRAIN, HOSTFILE=str(tmp_path / "hosts"))
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    expected = ["-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts"), "--master_port", "29500"]
    assert words[1:-4] == expected
    assert words[-4:] == TRAIN


def test_slurm_gets_one_task_per_gpu(tmp_path: Path) -> None:
    done = launch("launch_slurm.sh", *TRAIN, NODES="4", GPUS="2", PARTITION="long")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for option in ("nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "partition=long", "signal=USR1@300"):
        assert f"#SBATCH --{option}" in lines
    assert not any("account" in line for line in lines)
    assert lines[-2].startswith("export SRUN_CPUS_PER_TASK=8 ")
    assert shlex.split(lines[-1]) == ["exec", "srun", "--kill-on-bad-exit=1", sys.executable, *TRAIN]
    (tmp_path / "job.sh").write_text(done.stdout)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)


@pytest.mark.parametrize(
    ("script", "settings", "named"),
    [
        ("launch_multinode.sh", {"NODES": "2", "GPUS": "2", "MASTER": "a"}, "set NODE_RANK"),
        ("launch_multinode.sh", {"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere: no such file"),
        ("launch_slurm.sh", {"NODES": "2"}, "set GPUS"),
    ],
)
def test_what_is_missing_is_named(script: str, settings: dict[str, str], named: str) -> None:
    done = launch(script, *TRAIN, **settings)
    assert done.returncode == 1
    assert named in done.stderr


@pytest.mark.slow
def test_two_nodes_of_two_processes_train(tiny_overrides: list[str], tmp_path: Path) -> None:
    run = ("data.num_workers=0", "trainer.steps=3", "trainer.micro_batch_size=1", f"output={tmp_path / 'run'}")
    command = ["bash", str(ROOT / "scripts/launch_multinode.sh"), str(ROOT / "scripts/train.py"), *tiny_overrides, *run]
    settings = {"NODES": "2", "GPUS": "2", "MASTER": "127.0.0.1", "PORT": str(free_port()), "PYTHON": sys.executable}
    nodes = []
    for rank in range(2):
        env = {**os.environ, **settings, "NODE_RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = (tmp_path / f"node{rank}.log").open("w")
        nodes.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT))
    codes = [node.wait(timeout=900) for node in nodes]
    assert codes == [0, 0], (tmp_path / "node0.log").read_text()[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total" in line] == [1, 2, 3]
    load_model(tmp_path / "run")
