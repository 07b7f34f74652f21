"""MeViS, LV-VIS and ReVOS: masks of all objects as run-length codes in one mask_dict.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from glus.config import Layout
from tests.layouts.splits import Truth, Written, split_of, write_expressions, write_frames, write_json
from tests.layouts.videos import Video, make_video

REVOS_TYPES = {0: "referring", 1: "reasoning", 2: "non-existent"}


def write_mevis(root: Path, split: str) -> Written:
    """MeViS: version 1 has no sentence without an object; ``valid`` has no masks."""
    sentences = [("the two disks", (0, 1)), ("what comes in", (2,))]
    return _write_mevis(root, split, Layout.mevis, "meta_expressions.json", sentences)


def write_mevis_v2(root: Path, split: str) -> Written:
    """MeViS version 2: the last sentence of each video fits nothing."""
    sentences = [("the two disks", (0, 1)), ("what comes in", (2,)), ("a square", ())]
    file = "meta_expressions_v2_release.json" if split == "valid" else "meta_expressions_v2.json"
    return _write_mevis(root, split, Layout.mevis_v2, file, sentences)


def write_lvvis(root: Path, split: str) -> Written:
    """LV-VIS as re-packed by VISA: the names of categories have underscores in the file and none in the truth."""
    sentences = [("big_round_disk", (0, 1)), ("coin", (2,))]
    return _write_mevis(root, split, Layout.lvvis, "meta_expressions.json", sentences)


def _write_mevis(
    root: Path, split: str, layout: Layout, file: str, sentences: Sequence[tuple[str, tuple[int, ...]]]
) -> Written:
    folder = root / split
    videos = [make_video(f"{split}{i}", i) for i in range(2)]
    all_masks: dict[str, Any] = {}
    truth, values = {}, {}
    for video in videos:
        write_frames(folder / "JPEGImages" / video.name, video)
        anno_ids = _add_masks(all_masks, video)
        for number, (text, objects) in enumerate(sentences):
            key = video.name, str(number)
            value = {"exp": text, "obj_id": list(objects), "anno_id": [anno_ids[i] for i in objects]}
            values[key] = value if split != "valid" else {"exp": text}
            truth[key] = Truth(text.replace("_", " "), _union(video, objects), objects)
    write_expressions(folder / file, videos, values)
    if split == "valid":
        truth = {key: Truth(t.text, np.zeros_like(t.masks_THW)) for key, t in truth.items()}
    else:
        write_json(folder / "mask_dict.json", all_masks)
    return split_of(layout, root, split, videos, truth)


def write_revos(root: Path, split: str) -> Written:
    """ReVOS: ids of videos with slashes, three types, one mask file (and one of the foreground) for both splits."""
    all_masks: dict[str, Any] = {}
    foreground: dict[str, Any] = {}
    written = {}
    for number, part in enumerate(("train", "valid")):
        videos = [make_video(f"TAO/{part}/v{i}", 60 + 10 * number + i) for i in range(2)]
        truth, values = {}, {}
        for video in videos:
            write_frames(root / "JPEGImages" / video.name, video)
            anno_ids = _add_masks(all_masks, video)
            union = video.objects_OTHW.any(0)
            codes = [_code(mask) for mask in union]
            foreground[video.name] = {"masks_rle": codes, "foreground_ratio": [float(m.mean()) for m in union]}
            for exp_id, (type_id, objects) in enumerate([(0, (0, 1)), (1, (2,)), (2, ())]):
                text, key = f"what is of type {type_id}?", (video.name, str(exp_id))
                truth[key] = Truth(text, _union(video, objects), objects, REVOS_TYPES[type_id])
                values[key] = {
                    "exp": text,
                    "obj_id": list(objects),
                    "anno_id": [anno_ids[i] for i in objects],
                    "type_id": type_id,
                }
        write_expressions(root / f"meta_expressions_{part}_.json", videos, values)
        written[part] = split_of(Layout.revos, root, part, videos, truth)
    write_json(root / "mask_dict.json", all_masks)
    write_json(root / "mask_dict_foreground.json", foreground)
    return written[split]


def write_ref_sav(root: Path, split: str) -> Written:
    """Ref-SAV: a long description of one object and short ones, frames below ``videos``."""
    all_masks: dict[str, Any] = {}
    truth, values = {}, {}
    videos = [make_video(f"sav_05500{i}", 70 + i, step=4) for i in range(2)]
    for video in videos:
        write_frames(root / "videos" / video.name, video)
        anno_ids = _add_masks(all_masks, video)
        for number, kind in enumerate(("long", "short", "short")):
            key = video.name, str(number)
            truth[key] = Truth(f"a {kind} text", _union(video, [number]), (number,), kind)
            ids = {"obj_id": [number], "anno_id": [anno_ids[number]]}
            values[key] = {"exp": f"a {kind} text", **ids, "type_id": int(kind == "short")}
    write_expressions(root / f"meta_expressions_{split}.json", videos, values)
    write_json(root / "mask_dict.json", all_masks)
    return split_of(Layout.ref_sav, root, split, videos, truth)


def _add_masks(all_masks: dict[str, Any], video: Video) -> list[int]:
    """Put the video's objects into a mask_dict; their annotation ids."""
    ids = []
    for masks_THW in video.objects_OTHW:
        ids.append(len(all_masks) + 7)
        all_masks[str(ids[-1])] = [_code(mask) if mask.any() else None for mask in masks_THW]
    return ids


def _union(video: Video, objects: Sequence[int]) -> np.ndarray:
    return video.objects_OTHW[list(objects)].any(0)


def _code(mask_HW: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}
