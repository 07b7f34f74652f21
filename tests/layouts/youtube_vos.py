"""Ref-YouTube-VOS and GroundMoRe: masks in palettes; Ref-YouTube-VOS valid: grey in a folder per sentence."""

from __future__ import annotations

from dataclasses import replace
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
    write_json,
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


def write_groundmore(root: Path, split: str) -> Written:
    """GroundMoRe: 24 frames of which the second to fourth seconds are asked about; a test video is 20 of them."""
    videos, truth, entries = [], {}, {}
    for number in range(2):
        whole = make_video(f"clip{number}_0100_0104", 110 + number, num_frames=24)
        whole = replace(whole, frames=tuple(f"frame_{t:06d}" for t in range(24)))
        folder = root / "annotations" / whole.name
        write_frames(folder / "images", whole)
        visible = visible_parts(whole.objects_OTHW)
        write_palettes(folder / "masks", whole.frames[1:], object_ids(visible)[1:])  # none for the first
        inside_T = (np.arange(24) >= 6) & (np.arange(24) <= 17)
        shown = np.linspace(0, 23, 20, dtype=int) if split == "test" else np.arange(24)
        video = replace(whole, frames=tuple(whole.frames[t] for t in shown))
        times = {"action_start": "01:01", "action_end": "01:03"}
        questions = {}
        for exp_id, (kind, ids) in enumerate((("Causal", (1,)), ("Descriptive", (2, 3)))):
            masks = visible[[i - 1 for i in ids]].any(0) & inside_T[:, None, None]
            truth[video.name, str(exp_id)] = Truth(f"who {kind}?", masks[shown], ids, kind)
            told = {"question": f"who {kind}?", "answer": "it", "q_type": kind, **times}
            questions[str(exp_id)] = {**told, "obj_id": ", ".join(map(str, ids))}
        entries[video.name] = {"questions": questions}
        videos.append(video)
    write_json(root / f"{split}_v2.json", {"videos": entries})
    return split_of(Layout.groundmore, root, split, videos, truth)
