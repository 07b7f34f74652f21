"""Shapes on disk: the generated videos in the layouts of MeViS and Ref-YouTube-VOS.

A split appears whole, by a rename at the very end, or not at all; its ``shapes.json`` says how it was made, and
``kinds.json`` ({video: {exp_id: kind}}) under which kind each sentence is scored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from glus.data.rle import encode_rle
from glus.distributed import generator
from glus.files import atomic_folder, write_text
from glus.shapes.scene import KINDS, Scene, Sentence, generate_scene

SPLITS = {"train": 0, "valid": 1, "test": 2}
"""Split -> its number in the key of the random generator, so that no two splits share a video."""
SINGLE_OBJECT_KINDS = ("appearance", "motion", "global", "local")
"""Kinds that the Ref-YouTube-VOS layout can hold: it has exactly one object per sentence."""
FRAME_STEP = 5
"""Distance of frame names in the Ref-YouTube-VOS layout, as in the real dataset (every 5th frame of 30 fps)."""
JPEG_QUALITY = 95
PALETTE = (0, 0, 0, 236, 95, 103, 249, 145, 87, 250, 200, 99, 153, 199, 148, 98, 179, 178, 102, 153, 204)
"""RGB of the pixel values 0, 1, 2, ... in annotation files; colours for the eye only."""

_GENERATION = 1
"""Raised when the same settings give other videos than before."""

Progress = Callable[[int], None]
"""Called with the number of videos written so far."""


def scene_of(seed: int, split: str, index: int, num_frames: int = 16, size: int = 128) -> Scene:
    """Video ``index`` of a split: the same for both layouts and on every machine.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    return generate_scene(generator(seed, SPLITS[split], index), num_frames, size)


def write_shapes(
    folder: Path,
    split: str,
    num_videos: int,
    seed: int = 0,
    num_frames: int = 16,
    size: int = 128,
    progress: Progress | None = None,
) -> bool:
    """Write a split in the MeViS layout, with all kinds of sentences.

    ``<folder>/<split>/`` gets ``JPEGImages/<video>/00000.jpg``, ``meta_expressions.json``, ``mask_dict.json`` (one
    run-length code per frame, null where the object cannot be seen), ``kinds.json`` and ``shapes.json``. Absent
    sentences have empty lists of object and annotation ids, as in MeViS v2.

    Returns:
        False if the split is already there with the same settings, and nothing was done.

    Raises:
        FileExistsError: the split is there with other settings, or is not Shapes.
        OSError: it cannot be written.
        ValueError: a setting is out of range.
    """
    settings = _settings("mevis", split, num_videos, seed, num_frames, size)
    if _is_there(folder / split, settings):
        return False
    videos: dict[str, Any] = {}
    kinds: dict[str, dict[str, str]] = {}
    masks: dict[str, list[dict[str, Any] | None]] = {}
    frames = [f"{t:05d}" for t in range(num_frames)]
    with atomic_folder(folder / split) as staging:
        for number, (video, scene) in enumerate(_scenes(settings, progress)):
            _write_frames(staging / "JPEGImages" / video, frames, scene.frames_THW3)
            anno_ids = [len(masks) + item.object_id for item in scene.objects]
            masks.update({str(i): _encode(mask) for i, mask in zip(anno_ids, scene.masks_OTHW, strict=True)})
            expressions = {str(n): _mevis_expression(s, anno_ids) for n, s in enumerate(scene.sentences)}
            videos[video] = {"vid_id": number, "frames": frames, "expressions": expressions}
            kinds[video] = {str(n): sentence.kind for n, sentence in enumerate(scene.sentences)}
        _write_json(staging / "meta_expressions.json", {"videos": videos})
        _write_json(staging / "mask_dict.json", masks)
        _write_json(staging / "kinds.json", kinds)
        _write_json(staging / "shapes.json", settings)
    return True


def write_shapes_youtube(
    folder: Path,
    split: str,
    num_videos: int,
    seed: int = 0,
    num_frames: int = 16,
    size: int = 128,
    progress: Progress | None = None,
) -> bool:
    """Write a split in the Ref-YouTube-VOS layout, with the sentences that name one object.

    ``<folder>/<split>/`` gets ``JPEGImages/<video>/<frame>.jpg``, ``Annotations/<video>/<frame>.png`` (mode P, value
    = object id from 1), ``meta.json``, ``kinds.json`` and ``shapes.json``; the sentences are in
    ``<folder>/meta_expressions/<split>/meta_expressions.json``, with their ``obj_id`` in every split.

    Returns:
        False if the split is already there with the same settings, and nothing was done.

    Raises:
        FileExistsError: the split or its sentences are there with other settings, or are not Shapes.
        ValueError: a setting is out of range.
    """
    settings = _settings("ref_youtube_vos", split, num_videos, seed, num_frames, size)
    if _is_there(folder / split, settings):
        return False
    videos: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    kinds: dict[str, dict[str, str]] = {}
    frames = [f"{FRAME_STEP * t:05d}" for t in range(num_frames)]
    with atomic_folder(folder / split) as staging:
        for video, scene in _scenes(settings, progress):
            _write_frames(staging / "JPEGImages" / video, frames, scene.frames_THW3)
            _write_palettes(staging / "Annotations" / video, frames, scene.masks_OTHW)
            told = [sentence for sentence in scene.sentences if sentence.kind in SINGLE_OBJECT_KINDS]
            expressions = {str(n): {"exp": s.text, "obj_id": str(s.object_ids[0] + 1)} for n, s in enumerate(told)}
            videos[video] = {"expressions": expressions, "frames": frames}
            objects[video] = {"objects": _youtube_objects(scene, frames)}
            kinds[video] = {str(n): sentence.kind for n, sentence in enumerate(told)}
        _write_json(staging / "meta.json", {"videos": objects})
        _write_json(staging / "kinds.json", kinds)
        _write_json(staging / "shapes.json", settings)
        _put_beside(folder / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})
    return True


def count_kinds(folder: Path, split: str) -> Counter[str]:
    """Number of sentences of each kind in a written split, kinds in their usual order."""
    kinds = json.loads((folder / split / "kinds.json").read_text(encoding="utf-8"))
    found = Counter(kind for of_video in kinds.values() for kind in of_video.values())
    return Counter({kind: found[kind] for kind in KINDS if kind in found})


# --------------------------------------------------------------------------------------- whole or not at all


def _settings(layout: str, split: str, num_videos: int, seed: int, num_frames: int, size: int) -> dict[str, Any]:
    """What the bytes of a split depend on, as ``shapes.json`` keeps it."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if num_videos < 1 or seed < 0:
        raise ValueError(f"num_videos={num_videos}, seed={seed}: expected at least 1 video and a seed from 0")
    names = ("generation", "layout", "split", "num_videos", "seed", "num_frames", "size")
    return dict(zip(names, (_GENERATION, layout, split, num_videos, seed, num_frames, size), strict=True))


def _is_there(target: Path, settings: dict[str, Any]) -> bool:
    """Whether ``target`` already holds exactly this split; anything else in its place is an error."""
    if not target.exists():
        return False
    record = target / "shapes.json"
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if found == settings:
        return True
    raise FileExistsError(
        f"{target} exists and holds {'no Shapes (it has no shapes.json)' if found is None else found}; "
        f"expected {settings}. Remove the folder or choose another one"
    )


def _put_beside(path: Path, content: Any) -> None:
    """Write a file that lies outside the split's folder; one left by a killed run of the same settings is equal."""
    text = _json_text(content)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"{path} exists with other sentences than these Shapes have; remove it or choose another")
    write_text(path, text)


# ------------------------------------------------------------------------------------------------ the files


def _scenes(settings: dict[str, Any], progress: Progress | None) -> Iterator[tuple[str, Scene]]:
    for index in range(settings["num_videos"]):
        scene = scene_of(settings["seed"], settings["split"], index, settings["num_frames"], settings["size"])
        yield f"{settings['split']}{index:05d}", scene
        if progress is not None:
            progress(index + 1)


def _write_frames(folder: Path, names: list[str], frames_THW3: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for name, frame in zip(names, frames_THW3, strict=True):
        path = folder / f"{name}.jpg"
        _, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        path.write_bytes(data.tobytes())


def _write_palettes(folder: Path, names: list[str], masks_OTHW: np.ndarray) -> None:
    folder.mkdir(parents=True)
    values = np.arange(1, len(masks_OTHW) + 1, dtype=np.uint8)
    ids_THW = (masks_OTHW * values[:, None, None, None]).max(0)  # visible pixels never overlap
    for name, ids in zip(names, ids_THW, strict=True):
        image = Image.fromarray(ids)
        image.putpalette(PALETTE)  # turns mode L into P, keeping the values
        image.save(folder / f"{name}.png")


def _encode(masks_THW: np.ndarray) -> list[dict[str, Any] | None]:
    """COCO run-length code per frame; None where nothing is visible."""
    return [{"size": list(mask.shape), "counts": encode_rle(mask)} if mask.any() else None for mask in masks_THW]


def _mevis_expression(sentence: Sentence, anno_ids: list[int]) -> dict[str, Any]:
    ids = list(sentence.object_ids)
    return {"exp": sentence.text, "obj_id": ids, "anno_id": [anno_ids[number] for number in ids]}


def _youtube_objects(scene: Scene, frames: list[str]) -> dict[str, Any]:
    """The video's entry in ``meta.json``: category and frames of each object that is ever visible."""
    visible_OT = np.asarray(scene.masks_OTHW.any(axis=(2, 3)))
    return {
        str(item.object_id + 1): {
            "category": item.shape,
            "frames": [name for name, is_visible in zip(frames, visible_OT[item.object_id], strict=True) if is_visible],
        }
        for item in scene.objects
    }


def _json_text(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(_json_text(content), encoding="utf-8")
