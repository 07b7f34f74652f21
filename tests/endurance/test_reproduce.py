"""The chain of the reproduction scripts on tiny data: without network, stopped in the middle and continued."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from glus.shapes.write import write_shapes
from glus.tokens import Vocabulary

ROOT = Path(__file__).parents[2]
REFUSE_NETWORK = """
import ipaddress, os, socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        known = {info[4][0] for info in socket.getaddrinfo(host, None)}
        if not all(ipaddress.ip_address(ip.partition("%")[0]).is_loopback or ip in own for ip in known):
            with open(os.environ["REFUSED"], "a") as log:
                log.write(f"{address}\\n")
            raise OSError(f"refused: {address}")
    return connect(self, address)
socket.socket.connect = refuse
"""
"""``sitecustomize.py``, which every Python process imports: nothing but this machine can be reached, and each
attempt is written down, also where it is made in vain and in silence."""
STAGES = {"check_shapes_valid", "train", "export"} | {
    f"{name}_shapes_valid" for name in ("key_frames", "predict", "score", "submit")
}


@pytest.mark.parametrize("name", ["glus_s", "glus_a"])
def test_both_scripts_run_the_shared_one_for_their_experiment(name: str) -> None:
    """With key frames where the expected score was reached with them."""
    script = (ROOT / "scripts" / f"reproduce_{name}.sh").read_text()
    assert f'exec bash "$(dirname "$0")/reproduce.sh" {name}\n' in script
    recipe = OmegaConf.load(ROOT / "configs" / "experiment" / f"{name}.yaml").recipe
    assert ("export REPRODUCE_KEY_FRAMES=${REPRODUCE_KEY_FRAMES-self}\n" in script) == recipe.get("key_frames", False)


def test_a_split_without_key_frames_is_told_before_anything_is_done(tmp_path: Path) -> None:
    settings = {"REPRODUCE_KEY_FRAMES": str(tmp_path), "REPRODUCE_SCORE": "a", "REPRODUCE_SUBMIT": "b"}
    (tmp_path / "a.json").write_text("{}")
    env = {**os.environ, **settings, "REPRODUCE_OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "scripts" / "reproduce_glus_s.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"REPRODUCE_KEY_FRAMES={tmp_path}: b.json is not there" in done.stderr
    assert not (tmp_path / "out").exists()


def test_predictions_of_other_key_frames_do_not_pass_for_done(tmp_path: Path) -> None:
    """In a checkout whose Python does nothing."""
    for file, text in (
        ("scripts/reproduce.sh", (ROOT / "scripts" / "reproduce.sh").read_text()),
        (".venv/bin/python", "#!/bin/sh\n"),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
        (tmp_path / file).chmod(0o755)

    def run(key_frames: str) -> subprocess.CompletedProcess[str]:
        splits = {"REPRODUCE_CHECK": "", "REPRODUCE_SCORE": "a", "REPRODUCE_SUBMIT": ""}
        env = {**os.environ, **splits, "REPRODUCE_KEY_FRAMES": key_frames}
        command = ["bash", "scripts/reproduce.sh", "x"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    assert run("self").returncode == 0
    assert "predict_a: done before" in run("self").stdout
    other = run("")
    assert other.returncode == 1
    assert "outputs/reproduce_x holds predictions of a with 'self'; choose another REPRODUCE_OUT" in other.stderr


@pytest.mark.slow
def test_the_chain_runs_offline_stops_and_continues(tiny_vocabulary: Vocabulary, tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", "train", num_videos=2, seed=0, num_frames=8, size=64)
    write_shapes(tmp_path / "shapes", "valid", num_videos=2, seed=0, num_frames=8, size=64)
    out, refused = tmp_path / "out", tmp_path / "refused.txt"
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(REFUSE_NETWORK)
    random = [f"model.{part}.weights=null" for part in ("clip", "llm", "segmenter")]
    sizes = ["trainer.steps=1", "trainer.global_batch_size=1", "trainer.micro_batch_size=1", "data.num_workers=0"]
    env = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'offline'}:{ROOT}",
        "REFUSED": str(refused),
        "REPRODUCE_OUT": str(out),
        "REPRODUCE_CHECK": "shapes_valid",
        "REPRODUCE_SCORE": "shapes_valid",
        "REPRODUCE_SUBMIT": "shapes_valid",
        "REPRODUCE_KEY_FRAMES": "self",
        "REPRODUCE_PATHS": f"paths.data={tmp_path}",
        "REPRODUCE_TRAIN": " ".join([*random, *sizes, "valid=null", f"model.llm.tokenizer={tiny_vocabulary.folder}"]),
    }

    def run() -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / "reproduce.sh"), "shapes"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    (out / "predictions").mkdir(parents=True)
    probe = "import socket; socket.create_connection(('192.0.2.1', 9), 1)"
    assert "refused" in subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True).stderr
    refused.unlink()
    (out / "predictions" / "shapes_valid").write_text("in the way")
    broken = run()
    assert broken.returncode != 0
    assert {path.name for path in (out / "stages").iterdir()} == STAGES - {
        f"{name}_shapes_valid" for name in ("predict", "score", "submit")
    }
    (out / "predictions" / "shapes_valid").unlink()
    done = run()
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert "== train: done before" in done.stdout
    predicted = json.loads((out / "predictions" / "shapes_valid" / "predict.json").read_text())
    chosen = (out / "key_frames" / "shapes_valid" / "key_frames.json").read_bytes()
    assert predicted["identity"]["key_frames"] == hashlib.sha256(chosen).hexdigest()
    assert "J&F" in done.stdout
    assert {path.name for path in (out / "stages").iterdir()} == STAGES
    assert not refused.exists(), refused.read_text()
    with zipfile.ZipFile(out / "shapes_valid.zip") as archive:
        assert any(name.endswith(".png") for name in archive.namelist())
