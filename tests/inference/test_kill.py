"""Predictions survive kill -9."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glus.config import DatasetConfig, Layout, PredictConfig, PredictionConfig, PredictionForm
from glus.shapes.write import write_shapes
from tests.inference import kill_worker
from tests.inference.conftest import contents

NUM_KILLS = 10


def start(config: PredictConfig, world_size: int) -> list[multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kill_worker.__name__])
    tasks = [context.Process(target=kill_worker.predict, args=(config, rank, world_size)) for rank in range(world_size)]
    for task in tasks:
        task.start()
    return list(tasks)


def finish(config: PredictConfig, world_size: int) -> dict[str, bytes]:
    """Run to the end; all that lies in the folder then, but for what says who did it and how fast."""
    tasks = start(config, world_size)
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0] * world_size
    return contents(Path(config.output))


def state(folder: Path) -> dict[Path, int]:
    """Of the masks on their way; changes as soon as one is written."""
    times = {}
    for parent, folders, files in os.walk(folder):  # which takes no offence at folders that are renamed meanwhile
        for path in (Path(parent, name) for name in (*folders, *files)):
            if ".tmp" in f"{path.parent.name}/{path.name}":
                with contextlib.suppress(FileNotFoundError):
                    times[path] = path.stat().st_mtime_ns
    return times


@pytest.mark.slow
@pytest.mark.parametrize("form", PredictionForm)
def test_killed_at_random_moments_and_continued_a_prediction_ends_the_same(
    form: PredictionForm, model_folder: Path, tmp_path: Path
):
    write_shapes(tmp_path / "shapes", "valid", num_videos=6, num_frames=8, size=48)
    dataset = DatasetConfig("shapes_valid", Layout.mevis, str(tmp_path / "shapes"), "valid", groups="kinds.json")
    whole = PredictConfig(
        dataset=dataset, weights=str(model_folder), output=str(tmp_path / "whole"), format=form,
        inference=PredictionConfig(chunk_frames=2),  # so that masks are written all the time
    )  # fmt: skip
    killed = replace(whole, output=str(tmp_path / "killed"))
    folder = Path(killed.output)
    expected = finish(whole, world_size=1)
    seconds = json.loads((tmp_path / "whole" / "cost.json").read_text())["elapsed"]
    num_kills = num_at_work = 0
    while num_kills < NUM_KILLS:
        were_alive = kill_two(killed, np.random.default_rng().uniform(0, seconds / 2))
        finished = {name: data for name, data in contents(folder).items() if ".tmp" not in name}
        assert finished.items() <= expected.items()
        num_kills, num_at_work = num_kills + were_alive, num_at_work + any(folder.rglob(".*.tmp"))
        if not were_alive:  # done before they could be killed: from the start
            shutil.rmtree(folder)
    assert num_at_work > 0, "no kill hit a video at work"
    assert finish(killed, world_size=3) == expected, "the same files, nothing half-written, nothing temporary"
    records = [path.name for path in (folder / ".records").iterdir()]
    assert sorted(records) == [f"{path.name}.json" for path in sorted((tmp_path / "shapes/valid/JPEGImages").iterdir())]


def kill_two(config: PredictConfig, delay: float) -> bool:
    """Start two processes and kill them ``delay`` seconds after they begin a video; whether both were still at it."""
    before = state(Path(config.output))
    tasks = start(config, world_size=2)
    while state(Path(config.output)) == before and any(task.is_alive() for task in tasks):
        time.sleep(0.001)
    time.sleep(delay)
    were_alive = all(task.is_alive() for task in tasks)
    for task in tasks:
        task.kill()
        task.join()
        assert task.exitcode in (0, -signal.SIGKILL)
    return were_alive
