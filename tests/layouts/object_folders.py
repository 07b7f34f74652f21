"""ReasonVOS and Long-RVOS: grey masks in a folder per object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glus.config import Layout
from tests.layouts.splits import Truth, Written, split_of, write_expressions, write_frames, write_grey, write_json
from tests.layouts.videos import make_video


def write_reason_vos(root: Path, split: str) -> Written:
    """ReasonVOS: a list of expressions whose ``exp_id`` repeats for the objects of a video."""
    entries: dict[str, Any] = {}
    truth = {}
    videos = [make_video(f"reason{i}", 80 + i) for i in range(2)]
    for video, source in zip(videos, ("MOSE", "BURST"), strict=True):
        write_frames(root / "JPEGImages" / video.name, video)
        told = []
        for object_id in (1, 2):
            folder = f"{source}_{video.name}_{object_id}"
            masks = video.objects_OTHW[object_id - 1]
            write_grey(root / "Annotations" / folder, video.frames, masks)
            for exp_id in (0, 1):
                text = f"why {exp_id} of {object_id}?"
                told.append({"obj_id": str(object_id), "exp_id": exp_id, "exp_text": text, "is_sent": exp_id == 0})
                truth[video.name, f"{object_id}_{exp_id}"] = Truth(
                    text, masks, (object_id,), folder=f"{folder}/{exp_id}"
                )
        entries[video.name] = {"source": source, "frames": list(video.frames), "expressions": told}
    write_json(root / "meta_expressions.json", {"videos": entries})
    return split_of(Layout.reason_vos, root, split, videos, truth)


def write_long_rvos(root: Path, split: str) -> Written:
    """Long-RVOS: a folder of masks per object, in which frames without the object have no file."""
    types = ("static", "dynamic", "hybrid")
    videos = [make_video(f"{split}{i}", 90 + i) for i in range(2)]
    truth, values = {}, {}
    for video in videos:
        write_frames(root / split / "JPEGImages" / video.name, video)
        for number, kind in enumerate(types):
            masks = video.objects_OTHW[number]
            is_visible = masks.any((1, 2))
            names = [name for name, visible in zip(video.frames, is_visible, strict=True) if visible]
            write_grey(root / split / "Annotations" / video.name / str(number), names, masks[is_visible])
            truth[video.name, str(number)] = Truth(f"a {kind} disk", masks, (number,), kind)
            values[video.name, str(number)] = {"exp": f"a {kind} disk", "obj_id": str(number), "type": kind}
    write_expressions(root / split / "meta_expressions.json", videos, values)
    return split_of(Layout.long_rvos, root, split, videos, truth)
