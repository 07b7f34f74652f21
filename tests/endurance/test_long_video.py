"""Videos of thousands of frames: each frame gets its mask, and memory does not grow."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import cv2
import pytest

from glus.data.frames import FileVideo
from glus.pictures import write_movie
from glus.shapes.scene import Scene, draw_scenes
from tests.programs import ROOT, run_program
from tools.benchmark_inference import EARLY_FRAME, peaks

NUM_FRAMES = 1000
LONG = ("tiny", 10 * EARLY_FRAME, 128, 128)
"""Arguments of ``peaks``."""


@pytest.mark.slow
def test_every_frame_of_a_long_video_file_gets_its_mask(tmp_path: Path) -> None:
    scene: Scene = draw_scenes(seed=5, count=1, num_frames=NUM_FRAMES, size=96)[0]
    write_movie(tmp_path / "long.mp4", scene.frames_THW3, frames_per_second=25)
    target = scene.objects[0]
    texts = ("--text", f"the {target.colour_T[0]} {target.shape}", "--text", "the shapes")
    places = ("--weights", ROOT / "assets" / "glus_shapes", "--output", tmp_path / "out")
    done = run_program("scripts/segment_video.py", "--video", tmp_path / "long.mp4", *texts, *places)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert len(folders) == 2
    for folder in folders:
        masks = sorted(folder.glob("*.png"))
        assert len(masks) == NUM_FRAMES
        assert {cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape for path in (masks[0], masks[-1])} == {(96, 96)}
    assert len(FileVideo(tmp_path / "out" / "overlay.mp4")) == NUM_FRAMES
    assert json.loads((tmp_path / "out" / "segmentation.json").read_text())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video() -> None:
    """In processes of their own, whose peak is of this alone: a busy machine moves one peak, a leak moves each."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        growths = (late / early for early, late in (pool.apply(peaks, LONG) for _ in range(3)))
        assert any(growth <= 1.02 for growth in growths)
