"""Small valid datasets on disk in the layout of every benchmark, together with what is true of them.

``WRITERS[layout](root, split)`` writes a split as it is officially distributed and returns a ``Written``: its config
and, for each expression, the text, the masks, the group and the pixels to ignore that a reader must find. Everything is
drawn from disks and rectangles whose masks are computed here, not by the code under test.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from glus.config import DatasetConfig, Layout

SIZE = (36, 52)
NUM_FRAMES = 5
VOID_ROWS = 3
"""Lowest rows of every frame of Ref-DAVIS17, which are void (255)."""
REVOS_TYPES = {0: "referring", 1: "reasoning", 2: "non-existent"}


@dataclass(frozen=True)
class Truth:
    """What must be read of an expression."""

    text: str
    masks_THW: np.ndarray
    """bool."""
    object_ids: tuple[int, ...] = ()
    group: str = ""
    ignore_THW: np.ndarray | None = None
    """bool; None where the layout has no such pixels."""
    folder: str = ""
    """Where its prediction lies, if not in ``<video>/<exp_id>``."""


@dataclass(frozen=True)
class Written:
    """A split on disk."""

    dataset: DatasetConfig
    truth: dict[tuple[str, str], Truth]
    """By (video, exp_id), in the order in which the expressions must be read."""
    frames: dict[str, tuple[str, ...]]
    """Names of every video's frames."""


@dataclass(frozen=True)
class Video:
    """Three disks that wander over noise: the second overlaps the first, the third is absent in the first frame."""

    name: str
    frames: tuple[str, ...]
    objects_OTHW: np.ndarray
    """bool: each disk as a whole, whatever hides it."""
    pixels_THW3: np.ndarray


def make_video(name: str, seed: int, num_frames: int = NUM_FRAMES, step: int = 1, first: int = 0) -> Video:
    """A video whose frames are called by numbers of five digits."""
    rng = np.random.default_rng(seed)
    y_H1, x_1W = np.ogrid[: SIZE[0], : SIZE[1]]
    starts = rng.integers((12, 12), (SIZE[0] - 12, SIZE[1] - 24), (3, 2))
    starts[1] = starts[0] + 4
    objects = np.stack(
        [
            np.stack([(y_H1 - y) ** 2 + (x_1W - x - 2 * t) ** 2 <= radius**2 for t in range(num_frames)])
            for (y, x), radius in zip(starts, (7, 6, 4), strict=True)
        ]
    )
    objects[2, 0] = False
    pixels = rng.integers(0, 90, (num_frames, *SIZE, 3), dtype=np.uint8)
    for number, masks_THW in enumerate(objects):
        pixels[masks_THW] = np.roll((240, 130, 20), number)
    return Video(name, tuple(f"{first + step * t:05d}" for t in range(num_frames)), objects, pixels)


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


def write_ref_youtube_vos(root: Path, split: str) -> Written:
    """Ref-YouTube-VOS train: palettes, every fifth number a frame, not from 0."""
    folder = root / split
    videos = [make_video(f"{split}{i}", 20 + i, step=5, first=10) for i in range(2)]
    truth = {}
    for video in videos:
        visible = _visible(video.objects_OTHW)
        _write_frames(folder / "JPEGImages" / video.name, video)
        _write_palettes(folder / "Annotations" / video.name, video.frames, _ids(visible))
        for number, object_id in enumerate((2, 1, 3)):
            text = f"disk {object_id} of {video.name}"
            truth[video.name, str(number)] = Truth(
                text, visible[object_id - 1], (object_id,), ignore_THW=np.zeros_like(visible[0])
            )
    values = {key: {"exp": t.text, "obj_id": str(t.object_ids[0])} for key, t in truth.items()}
    _write_json(root / "meta_expressions" / split / "meta_expressions.json", _videos(videos, values))
    return _written(Layout.ref_youtube_vos, root, split, videos, truth)


def write_ref_youtube_vos_valid(root: Path, split: str = "valid") -> Written:
    """Ref-YouTube-VOS valid with the masks that were released later; its file also lists a video of test."""
    videos = [make_video(f"{split}{i}", 30 + i, step=5) for i in range(2)]
    test = make_video("test0", 40)
    truth = {}
    for video in videos:
        _write_frames(root / split / "JPEGImages" / video.name, video)
        for number in range(11):
            masks = video.objects_OTHW[number % 3]
            truth[video.name, str(number)] = Truth(f"sentence {number}", masks)
            _write_grey(root / split / "Annotations" / video.name / str(number), video.frames, masks)
    values = {key: {"exp": t.text} for key, t in truth.items()} | {("test0", "0"): {"exp": "of test"}}
    _write_json(root / "meta_expressions" / split / "meta_expressions.json", _videos([*videos, test], values))
    _write_json(root / "meta_expressions/test/meta_expressions.json", _videos([test], values))
    return _written(Layout.ref_youtube_vos_valid, root, split, videos, truth)


def write_ref_davis17(root: Path, split: str) -> Written:
    """Ref-DAVIS17 as converted: four sentences per object, the lowest rows void."""
    videos = [make_video(f"{split}-{i}", 50 + i) for i in range(2)]
    truth = {}
    for video in videos:
        _write_frames(root / split / "JPEGImages" / video.name, video)
        ids, void = davis_ids(video)
        _write_palettes(root / split / "Annotations" / video.name, video.frames, ids)
        for number in range(12):
            object_id = number // 4 + 1
            truth[video.name, str(number)] = Truth(
                f"disk {object_id} by {number % 4}", ids == object_id, (object_id,), ignore_THW=void
            )
    values = {key: {"exp": t.text, "obj_id": str(t.object_ids[0])} for key, t in truth.items()}
    _write_json(root / "meta_expressions" / split / "meta_expressions.json", _videos(videos, values))
    return _written(Layout.ref_davis17, root, split, videos, truth)


def davis_ids(video: Video) -> tuple[np.ndarray, np.ndarray]:
    """Object ids as DAVIS has them, (T, H, W) uint8, all in the first frame; and where they are void, bool."""
    objects = video.objects_OTHW.copy()
    objects[2, 0] = objects[2, 1]
    ids = _ids(_visible(objects))
    void = np.zeros(ids.shape, bool)
    void[:, -VOID_ROWS:] = True
    ids[void] = 255
    return ids, void


def write_revos(root: Path, split: str) -> Written:
    """ReVOS: ids of videos with slashes, three types, one mask file (and one of the foreground) for both splits."""
    all_masks: dict[str, Any] = {}
    foreground: dict[str, Any] = {}
    written = {}
    for number, part in enumerate(("train", "valid")):
        videos = [make_video(f"TAO/{part}/v{i}", 60 + 10 * number + i) for i in range(2)]
        truth, values = {}, {}
        for video in videos:
            _write_frames(root / "JPEGImages" / video.name, video)
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
        _write_json(root / f"meta_expressions_{part}_.json", _videos(videos, values))
        written[part] = _written(Layout.revos, root, part, videos, truth)
    _write_json(root / "mask_dict.json", all_masks)
    _write_json(root / "mask_dict_foreground.json", foreground)
    return written[split]


def write_reason_vos(root: Path, split: str) -> Written:
    """ReasonVOS: a list of expressions whose ``exp_id`` repeats for the objects of a video."""
    entries: dict[str, Any] = {}
    truth = {}
    videos = [make_video(f"reason{i}", 80 + i) for i in range(2)]
    for video, source in zip(videos, ("MOSE", "BURST"), strict=True):
        _write_frames(root / "JPEGImages" / video.name, video)
        told = []
        for object_id in (1, 2):
            folder = f"{source}_{video.name}_{object_id}"
            masks = video.objects_OTHW[object_id - 1]
            _write_grey(root / "Annotations" / folder, video.frames, masks)
            for exp_id in (0, 1):
                text = f"why {exp_id} of {object_id}?"
                told.append({"obj_id": str(object_id), "exp_id": exp_id, "exp_text": text, "is_sent": exp_id == 0})
                truth[video.name, f"{object_id}_{exp_id}"] = Truth(
                    text, masks, (object_id,), folder=f"{folder}/{exp_id}"
                )
        entries[video.name] = {"source": source, "frames": list(video.frames), "expressions": told}
    _write_json(root / "meta_expressions.json", {"videos": entries})
    return _written(Layout.reason_vos, root, split, videos, truth)


def write_long_rvos(root: Path, split: str) -> Written:
    """Long-RVOS: a folder of masks per object, in which frames without the object have no file."""
    types = ("static", "dynamic", "hybrid")
    videos = [make_video(f"{split}{i}", 90 + i) for i in range(2)]
    truth, values = {}, {}
    for video in videos:
        _write_frames(root / split / "JPEGImages" / video.name, video)
        for number, kind in enumerate(types):
            masks = video.objects_OTHW[number]
            is_visible = masks.any((1, 2))
            names = [name for name, visible in zip(video.frames, is_visible, strict=True) if visible]
            _write_grey(root / split / "Annotations" / video.name / str(number), names, masks[is_visible])
            truth[video.name, str(number)] = Truth(f"a {kind} disk", masks, (number,), kind)
            values[video.name, str(number)] = {"exp": f"a {kind} disk", "obj_id": str(number), "type": kind}
    _write_json(root / split / "meta_expressions.json", _videos(videos, values))
    return _written(Layout.long_rvos, root, split, videos, truth)


REFCOCO_SPLITS = ("train", "val", "testA", "testB", "test")


def write_refcoco(root: Path, split: str, first_image: int = 1) -> Written:
    """One of the RefCOCO sets, with its pictures in ``../images``; they are numbered from ``first_image``.

    Each split has two pictures; on each an object of two polygons and one as a run-length code, with two sentences.
    """
    images, annotations, refs = [], [], []
    truths: dict[str, dict[tuple[str, str], Truth]] = {part: {} for part in REFCOCO_SPLITS}
    videos: dict[str, list[Video]] = {part: [] for part in REFCOCO_SPLITS}
    for index in range(2 * len(REFCOCO_SPLITS)):
        part, image_id = REFCOCO_SPLITS[index // 2], first_image + index
        name = f"COCO_train2014_{image_id:012d}"
        picture = make_video(name, image_id, num_frames=1)
        video = Video(name, (name,), picture.objects_OTHW, picture.pixels_THW3)
        videos[part].append(video)
        _write_frames(root.parent / "images/mscoco/images/train2014", video)
        images.append({"id": image_id, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
        for number in (0, 1):
            ann_id = 2 * image_id + number
            boxes = [(2, 3, 9, 11), (20, 5, 30, 30)]
            mask = _boxes(boxes) if number == 0 else video.objects_OTHW[0, 0]
            outline = [_polygon(box) for box in boxes] if number == 0 else _plain_code(mask)
            annotations.append({"id": ann_id, "image_id": image_id, "category_id": 1, "segmentation": outline})
            sentences = []
            for sent_id in (2 * ann_id, 2 * ann_id + 1):
                text = f"sentence {sent_id}"
                sentences.append({"sent": text, "raw": text, "tokens": text.split(), "sent_id": sent_id})
                truths[part][name, str(sent_id)] = Truth(text, mask[None], (ann_id,))
            refs.append(
                {
                    "ref_id": ann_id,
                    "ann_id": ann_id,
                    "image_id": image_id,
                    "file_name": f"{name}_{ann_id}.jpg",
                    "category_id": 1,
                    "split": part,
                    "sentences": sentences,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                }
            )
    _write_json(root / "instances.json", {"images": images, "annotations": annotations})
    file = "refs(umd).p" if root.name == "refcocog" else "refs(unc).p"
    (root / file).write_bytes(pickle.dumps(refs, protocol=0))
    return _written(Layout.refcoco, root, split, videos[split], truths[split])


def write_reason_seg(root: Path, split: str) -> Written:
    """ReasonSeg: a small target inside an ignored area inside a large target; the second file is in cp1252."""
    truth, videos = {}, []
    for index, encoding in enumerate(("utf-8", "cp1252")):
        name = f"{split}_{index}"
        picture = make_video(name, 110 + index, num_frames=1)
        videos.append(Video(name, (name,), picture.objects_OTHW, picture.pixels_THW3))
        _write_frames(root / split, videos[-1])
        texts = ["the café’s door", "the door"]
        target, ignored, small = (4, 2, 40, 30), (10, 8, 30, 20), (14, 10, 20, 16)
        shapes = [
            {"label": "target", "points": _corners(small)},
            {"label": "flag", "points": [[0, 0]]},
            {"label": "Ignored area", "points": _corners(ignored)},
            {"label": "target", "points": _corners(target)},
        ]
        content = {"text": texts, "is_sentence": index == 0, "shapes": shapes}
        file = root / split / f"{name}.json"
        file.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
        is_ignored = _boxes([_closed(ignored)]) & ~_boxes([_closed(small)])
        mask = _boxes([_closed(target)]) & ~is_ignored
        for number, text in enumerate(texts if split == "train" else texts[:1]):
            truth[name, str(number)] = Truth(
                text, mask[None], (0,), "long" if index == 0 else "short", ignore_THW=is_ignored[None]
            )
    return _written(Layout.reason_seg, root, split, videos, truth)


def write_davis_download(root: Path) -> None:
    """What DAVIS 2017 and its sentences are before the conversion: one video of train, two of val.

    The sentences misspell a name, and the second annotator's are in latin-1.
    """
    splits = {"train": ["classic-car"], "val": ["bear", "dogs-scale"]}
    for split, names in splits.items():
        sets = root / "DAVIS/ImageSets/2017"
        sets.mkdir(parents=True, exist_ok=True)
        (sets / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for seed, name in enumerate(names):
            video = make_video(name, 120 + seed)
            _write_frames(root / "DAVIS/JPEGImages/480p" / name, video)
            _write_palettes(root / "DAVIS/Annotations_unsupervised/480p" / name, video.frames, davis_ids(video)[0])
    folder = root / "davis_text_annotations"
    folder.mkdir()
    for number, (file, encoding) in enumerate(DAVIS_SENTENCES.items()):
        lines = [
            f'{name} {object_id} "{davis_sentence(name, object_id, number)}"\n'
            for object_id in (2, 1, 3)
            for name in ("clasic-car", "bear", "dog-scale")
        ]
        (folder / file).write_bytes("".join(lines).encode(encoding))


DAVIS_SENTENCES = {
    "Davis17_annot1.txt": "utf-8",
    "Davis17_annot1_full_video.txt": "utf-8",
    "Davis17_annot2.txt": "latin-1",
    "Davis17_annot2_full_video.txt": "latin-1",
}


def davis_sentence(video: str, object_id: int, annotator: int) -> str:
    """What an annotator says in ``write_davis_download``."""
    return f"the fiancée with disk {object_id} of {video}, says {annotator}"


WRITERS: dict[Layout, Callable[[Path, str], Written]] = {
    Layout.mevis: write_mevis,
    Layout.mevis_v2: write_mevis_v2,
    Layout.ref_youtube_vos: write_ref_youtube_vos,
    Layout.ref_youtube_vos_valid: write_ref_youtube_vos_valid,
    Layout.ref_davis17: write_ref_davis17,
    Layout.revos: write_revos,
    Layout.reason_vos: write_reason_vos,
    Layout.lvvis: write_lvvis,
    Layout.long_rvos: write_long_rvos,
    Layout.refcoco: write_refcoco,
    Layout.reason_seg: write_reason_seg,
}


# ------------------------------------------------------------------------------------------------ the pieces


def _write_mevis(
    root: Path, split: str, layout: Layout, file: str, sentences: Sequence[tuple[str, tuple[int, ...]]]
) -> Written:
    folder = root / split
    videos = [make_video(f"{split}{i}", i) for i in range(2)]
    all_masks: dict[str, Any] = {}
    truth, values = {}, {}
    for video in videos:
        _write_frames(folder / "JPEGImages" / video.name, video)
        anno_ids = _add_masks(all_masks, video)
        for number, (text, objects) in enumerate(sentences):
            key = video.name, str(number)
            value = {"exp": text, "obj_id": list(objects), "anno_id": [anno_ids[i] for i in objects]}
            values[key] = value if split != "valid" else {"exp": text}
            truth[key] = Truth(text.replace("_", " "), _union(video, objects), objects)
    _write_json(folder / file, _videos(videos, values))
    if split == "valid":
        truth = {key: Truth(t.text, np.zeros_like(t.masks_THW)) for key, t in truth.items()}
    else:
        _write_json(folder / "mask_dict.json", all_masks)
    return _written(layout, root, split, videos, truth)


def _written(
    layout: Layout, root: Path, split: str, videos: Sequence[Video], truth: dict[tuple[str, str], Truth]
) -> Written:
    dataset = DatasetConfig(name=layout.value, layout=layout, root=str(root), split=split)
    return Written(dataset, truth, {video.name: video.frames for video in videos})


def _videos(videos: Sequence[Video], values: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """The usual expression file; ids in an order that is not numeric."""
    return {
        "videos": {
            video.name: {
                "expressions": {key[1]: value for key, value in reversed(values.items()) if key[0] == video.name},
                "frames": list(video.frames),
            }
            for video in videos
        }
    }


def _add_masks(all_masks: dict[str, Any], video: Video) -> list[int]:
    """Put the video's objects into a mask_dict; their annotation ids."""
    ids = []
    for masks_THW in video.objects_OTHW:
        ids.append(len(all_masks) + 7)
        all_masks[str(ids[-1])] = [_code(mask) if mask.any() else None for mask in masks_THW]
    return ids


def _union(video: Video, objects: Sequence[int]) -> np.ndarray:
    return video.objects_OTHW[list(objects)].any(0)


def _visible(objects_OTHW: np.ndarray) -> np.ndarray:
    """Each object without what later objects hide."""
    hidden = np.zeros(objects_OTHW.shape[1:], bool)
    visible = np.zeros_like(objects_OTHW)
    for number in reversed(range(len(objects_OTHW))):
        visible[number] = objects_OTHW[number] & ~hidden
        hidden |= objects_OTHW[number]
    return visible


def _ids(visible_OTHW: np.ndarray) -> np.ndarray:
    """(T, H, W) uint8: 0, or the number from 1 of the object that is seen."""
    numbers = np.arange(1, len(visible_OTHW) + 1, dtype=np.uint8)
    return (visible_OTHW * numbers[:, None, None, None]).max(0)


def _code(mask_HW: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(mask_HW, np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def _plain_code(mask_HW: np.ndarray) -> dict[str, Any]:
    """A run-length code as a list of runs."""
    pixels = mask_HW.T.reshape(-1).astype(int)
    borders = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *borders, pixels.size]).tolist()
    return {"size": list(mask_HW.shape), "counts": [0, *runs] if pixels[0] else runs}


Box = tuple[int, int, int, int]
"""Left, top, right, bottom; right and bottom are the first pixels outside."""


def _boxes(boxes: Sequence[Box]) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def _polygon(box: Box) -> list[float]:
    """COCO's polygons go along the borders of pixels."""
    return [value for point in _corners(box) for value in point]


def _corners(box: Box) -> list[list[float]]:
    left, top, right, bottom = (float(side) for side in box)
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def _closed(box: Box) -> Box:
    """ReasonSeg's outlines go through the middle of pixels and belong to the shape."""
    left, top, right, bottom = box
    return left, top, right + 1, bottom + 1


def _write_frames(folder: Path, video: Video) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(video.frames, video.pixels_THW3, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)


def _write_palettes(folder: Path, frames: Sequence[str], ids_THW: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in zip(frames, ids_THW, strict=True):
        image = Image.fromarray(ids)
        image.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
        image.save(folder / f"{name}.png")


def _write_grey(folder: Path, frames: Sequence[str], masks_THW: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(frames, masks_THW, strict=True):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}.png")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
