"""Ref-YouTube-VOS: masks in palettes, or grey in a folder per sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from glus.config import Layout
from tests.layouts.splits import (
    Truth,
    Written,
    split_of,
    write_expressions,
    write_frames,
    write_grey,
    write_palettes,
)
from tests.layouts.videos import make_video, object_ids, visible_parts


def write_ref_youtube_vos(root: Path, split: str) -> Written:
    """Ref-YouTube-VOS train: palettes, every fifth number a frame, not from 0."""
    folder = root / split
    videos = [make_video(f"{split}{i}", 20 + i, step=5, first=10) for i in range(2)]
    truth = {}
    for video in videos:
        visible = visible_parts(video.objects_OTHW)
        write_frames(folder / "JPEGImages" / video.name, video)
        write_palettes(folder / "Annotations" / video.name, video.frames, object_ids(visible))
        for number, object_id in enumerate((2, 1, 3)):
            text = f"disk {object_id} of {video.name}"
            truth[video.name, str(number)] = Truth(
                text, visible[object_id - 1], (object_id,), ignore_THW=np.zeros_like(visible[0])
            )
    values = {key: {"exp": t.text, "obj_id": str(t.object_ids[0])} for key, t in truth.items()}
    write_expressions(root / "meta_expressions" / split / "meta_expressions.json", videos, values)
    return split_of(Layout.ref_youtube_vos, root, split, videos, truth)


def write_ref_youtube_vos_valid(root: Path, split: str = "valid") -> Written:
    """Ref-YouTube-VOS valid with the masks that were released later; its file also lists a video of test."""
    videos = [make_video(f"{split}{i}", 30 + i, step=5) for i in range(2)]
    test = make_video("test0", 40)
    truth = {}
    for video in videos:
        write_frames(root / split / "JPEGImages" / video.name, video)
        for number in range(11):
            masks = video.objects_OTHW[number % 3]
            truth[video.name, str(number)] = Truth(f"sentence {number}", masks)
            write_grey(root / split / "Annotations" / video.name / str(number), video.frames, masks)
    values = {key: {"exp": t.text} for key, t in truth.items()} | {("test0", "0"): {"exp": "of test"}}
    write_expressions(root / "meta_expressions" / split / "meta_expressions.json", [*videos, test], values)
    write_expressions(root / "meta_expressions/test/meta_expressions.json", [test], values)
    return split_of(Layout.ref_youtube_vos_valid, root, split, videos, truth)
