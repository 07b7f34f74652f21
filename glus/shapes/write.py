"""Shapes on disk: the generated videos in the layouts of MeViS and Ref-YouTube-VOS, and a sheet of them for people.

A split appears whole, by a rename at the very end, or not at all; its ``shapes.json`` says how it was made, and
``kinds.json`` ({video: {exp_id: kind}}) under which kind each sentence is scored, ``evidence.json`` ({video: {exp_id:
frames}}) which frames show the look-alike that a sentence names (null: no single frame).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from glus.console import bar
from glus.data.masks import encode_rle
from glus.files import atomic_file, atomic_folder, write_text
from glus.painter import PAPER
from glus.pictures import strip
from glus.shapes.scene import KINDS, STRUCTURES, Scene, Sentence, exchange, scene_of

LAYOUT_KINDS = {"mevis": KINDS, "ref_youtube_vos": ("appearance", *STRUCTURES)}
"""Layout -> kinds of sentences that it can hold: Ref-YouTube-VOS has exactly one object per sentence."""
YOUTUBE_STEP = 5
"""Distance of frame names in Ref-YouTube-VOS, as in the real dataset (every 5th frame of 30 fps)."""
JPEG_QUALITY = 95
MASK_PALETTE = (0, 0, 0, 236, 95, 103, 249, 145, 87, 250, 200, 99, 153, 199, 148, 98, 179, 178, 102, 153, 204)
"""RGB of the pixel values 0, 1, 2, ... in annotation files; colours for the eye only."""
Tables = defaultdict[str, dict[str, Any]]
"""Name of a JSON file -> what it is to hold."""

EXCHANGED = "meta_expressions_exchanged.json"
"""Sentences of which those that name one look-alike name the other in half of the videos: there is nothing to learn."""
_GENERATION = 2
"""Raised when the same settings give other videos than before."""
_COLUMNS, _SIDE, _GAP = 16, 84, 6


def write_shapes(
    folder: Path,
    split: str,
    num_videos: int,
    seed: int = 0,
    num_frames: int = 16,
    size: int = 128,
    layout: str = "mevis",
) -> bool:
    """Write a split, with the kinds of sentences that its layout can hold.

    ``<folder>/<split>/`` gets ``JPEGImages/<video>/<frame>.jpg``, ``kinds.json``, ``evidence.json``, ``shapes.json``
    and

    - MeViS: ``meta_expressions.json`` and ``mask_dict.json`` (one run-length code per frame, null where the object
      cannot be seen). Absent sentences have empty lists of object and annotation ids, as in MeViS v2. ``EXCHANGED``
      is a control for training.
    - Ref-YouTube-VOS: ``Annotations/<video>/<frame>.png`` (mode P, value = object id from 1) and ``meta.json``; the
      sentences are in ``<folder>/meta_expressions/<split>/meta_expressions.json``, with their ``obj_id`` in every
      split.

    Args:
        folder, split, num_videos, seed, num_frames, size, layout: which videos, in which of ``LAYOUT_KINDS``.

    Returns:
        False if the split is already there with the same settings, and nothing was done.

    Raises:
        FileExistsError: the split or its sentences are there with other settings, or are not Shapes.
        OSError: it cannot be written.
        ValueError: a setting is out of range.
    """
    if num_videos < 1 or seed < 0:
        raise ValueError(f"num_videos={num_videos}, seed={seed}: expected at least 1 video and a seed from 0")
    settings = {"generation": _GENERATION, "layout": layout, "split": split, "num_videos": num_videos}
    settings |= {"seed": seed, "num_frames": num_frames, "size": size}
    if _is_there(folder / split, settings):
        return False
    tables: Tables = defaultdict(dict)
    with atomic_folder(folder / split) as staging:
        for number in bar(range(num_videos), num_videos, split):
            scene = scene_of(seed, split, number, num_frames, size)
            _add_video(staging, tables, f"{split}{number:05d}", scene, layout)
        beside = [] if layout == "mevis" else [tables.pop("meta_expressions.json")]
        for name, content in {**tables, "shapes.json": settings}.items():
            (staging / name).write_text(_json_text(content), encoding="utf-8")
        for sentences in beside:
            _put_beside(folder / "meta_expressions" / split / "meta_expressions.json", _json_text(sentences))
    return True


def count_kinds(folder: Path, split: str) -> Counter[str]:
    """Number of sentences of each kind in a written split."""
    kinds = json.loads((folder / split / "kinds.json").read_text(encoding="utf-8"))
    return Counter(kind for of_video in kinds.values() for kind in of_video.values())


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


def _put_beside(path: Path, text: str) -> None:
    """Write a file that lies outside the split's folder; one left by a killed run of the same settings is equal."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"{path} exists with other sentences than these Shapes have; remove it or choose another")
    write_text(path, text)


def _add_video(staging: Path, tables: Tables, video: str, scene: Scene, layout: str) -> None:
    """Write its pictures, and add it to the tables."""
    step = 1 if layout == "mevis" else YOUTUBE_STEP
    frames = [f"{step * t:05d}" for t in range(len(scene.frames_THW3))]
    sentences = {str(n): s for n, s in enumerate(s for s in scene.sentences if s.kind in LAYOUT_KINDS[layout])}
    tables["kinds.json"][video] = {exp_id: sentence.kind for exp_id, sentence in sentences.items()}
    tables["evidence.json"][video] = {n: scene.evidence(s) for n, s in sentences.items() if s.kind in STRUCTURES}
    (staging / "JPEGImages" / video).mkdir(parents=True)
    for name, frame in zip(frames, scene.frames_THW3, strict=True):
        _, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (staging / "JPEGImages" / video / f"{name}.jpg").write_bytes(data.tobytes())
    if layout == "mevis":
        _add_mevis_entries(tables, video, frames, scene)
    else:
        _write_palettes(staging / "Annotations" / video, frames, scene.masks_OTHW)
        tables["meta.json"].setdefault("videos", {})[video] = {"objects": _youtube_objects(frames, scene)}
        expressions = {n: {"exp": s.text, "obj_id": str(s.object_ids[0] + 1)} for n, s in sentences.items()}
        entry = {"expressions": expressions, "frames": frames}
        tables["meta_expressions.json"].setdefault("videos", {})[video] = entry


def _add_mevis_entries(tables: Tables, video: str, frames: list[str], scene: Scene) -> None:
    """Masks, and the video with its sentences as they are and exchanged; annotation ids count the objects of the whole
    split."""
    masks, number = tables["mask_dict.json"], len(tables["kinds.json"]) - 1
    first = len(masks)
    for masks_THW in scene.masks_OTHW:
        codes = [{"size": list(m.shape), "counts": encode_rle(m)} if m.any() else None for m in masks_THW]
        masks[str(len(masks))] = codes
    for name, said in (("meta_expressions.json", scene), (EXCHANGED, exchange(scene, number))):
        expressions = {
            str(n): {"exp": s.text, "obj_id": list(s.object_ids), "anno_id": [first + i for i in s.object_ids]}
            for n, s in enumerate(said.sentences)
        }
        entry = {"vid_id": number, "frames": frames, "expressions": expressions}
        tables[name].setdefault("videos", {})[video] = entry


def _write_palettes(folder: Path, frames: list[str], masks_OTHW: np.ndarray) -> None:
    folder.mkdir(parents=True)
    values = np.arange(1, len(masks_OTHW) + 1, dtype=np.uint8)
    ids_THW = (masks_OTHW * values[:, None, None, None]).max(0)  # visible pixels never overlap
    for name, ids in zip(frames, ids_THW, strict=True):
        image = Image.fromarray(ids)
        image.putpalette(MASK_PALETTE)  # turns mode L into P, keeping the values
        image.save(folder / f"{name}.png")


def _youtube_objects(frames: list[str], scene: Scene) -> dict[str, Any]:
    """Of a video in ``meta.json``: category and frames of each object that is ever visible."""
    return {
        str(item.object_id + 1): {
            "category": item.shape,
            "frames": [name for name, mask in zip(frames, masks_THW, strict=True) if mask.any()],
        }
        for item, masks_THW in zip(scene.objects, scene.masks_OTHW, strict=True)
    }


def _json_text(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


# ------------------------------------------------------------------------------------------ the contact sheet


def write_contact_sheet(
    path: Path, seed: int, num_frames: int = 16, size: int = 128, kinds: Sequence[str] = KINDS
) -> None:
    """Draw to a PNG file a row of frames for each kind, of the first training video that has it.

    The objects of its sentence are marked; where none is in sight, it says "nothing". The file appears whole or not at
    all.

    Raises:
        OSError: it cannot be written.
    """
    rows = []
    for kind in kinds:
        index = STRUCTURES.index(kind) if kind in STRUCTURES else 0
        scene = scene_of(seed, "train", index, num_frames, size)
        rows.append(_row(scene, next(sentence for sentence in scene.sentences if sentence.kind == kind)))
    _, data = cv2.imencode(path.suffix, np.concatenate(rows)[..., ::-1])
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _row(scene: Scene, sentence: Sentence) -> np.ndarray:
    picked = np.linspace(0, len(scene.frames_THW3) - 1, _COLUMNS).round().astype(int)
    masks_nHW = np.any(scene.masks_OTHW[list(sentence.object_ids)][:, picked], axis=0)
    names = [f"{number:05d}" for number in picked]
    text = f"{sentence.kind}: {sentence.text}"
    # Without a fill: sentences name colours.
    row = strip(text, names, scene.frames_THW3[picked], {"": masks_nHW}, long_side=_SIDE, fill=0)
    return cv2.copyMakeBorder(row, 0, _GAP, 0, 0, cv2.BORDER_CONSTANT, value=PAPER)
