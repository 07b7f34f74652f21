"""Predictions survive kill -9."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from glus.config import DatasetConfig, Layout, PredictConfig, PredictionForm
from glus.data.shapes_writer import write_shapes
from tests.inference import kill_worker

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
    return contents(Path(config.output_dir))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".records"]
    about_the_run = (folder / "predict.json", folder / "summary.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path not in about_the_run}


def state(folder: Path) -> dict[Path, int]:
    """Of the masks on their way; changes as soon as one is written."""
    times = {}
    for path in [*folder.rglob(".*.tmp"), *folder.rglob(".*.tmp/*")]:
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
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = PredictConfig(dataset=dataset, weights=str(model_folder), output_dir=str(killed), format=form)
    expected = finish(PredictConfig(dataset=dataset, weights=config.weights, output_dir=str(whole), format=form), 1)
    rng, num_kills, num_halves = np.random.default_rng(), 0, 0
    while num_kills < NUM_KILLS:
        before = state(killed)
        tasks = start(config, world_size=2)
        while state(killed) == before and any(task.is_alive() for task in tasks):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        were_alive = all(task.is_alive() for task in tasks)
        for task in tasks:
            task.kill()
            task.join()
            assert task.exitcode in (0, -signal.SIGKILL)
        half = {name for name in contents(killed) if ".tmp" in name}
        assert all(expected[name] == data for name, data in contents(killed).items() if name not in half)
        if were_alive:
            num_kills, num_halves = num_kills + 1, num_halves + bool(half)
        else:  # done before it could be killed: from the start
            shutil.rmtree(killed)
    assert num_halves > 0, "no kill hit a video at work"
    assert finish(config, 3) == expected, "the same files, nothing half-written, nothing temporary"
    records = [path.name for path in (killed / ".records").iterdir()]
    assert sorted(records) == [f"{path.name}.json" for path in sorted((tmp_path / "shapes/valid/JPEGImages").iterdir())]
