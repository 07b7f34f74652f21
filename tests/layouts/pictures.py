"""RefCOCO, RefCOCO+, RefCOCOg and ReasonSeg: pictures with outlines."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glus.config import Layout
from tests.layouts.splits import Truth, Written, split_of, write_frames, write_json
from tests.layouts.videos import SIZE, Video, make_picture

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
        video = make_picture(name, image_id)
        videos[part].append(video)
        write_frames(root.parent / "images/mscoco/images/train2014", video)
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
    write_json(root / "instances.json", {"images": images, "annotations": annotations})
    file = "refs(umd).p" if root.name == "refcocog" else "refs(unc).p"
    (root / file).write_bytes(pickle.dumps(refs, protocol=0))
    return split_of(Layout.refcoco, root, split, videos[split], truths[split])


def write_reason_seg(root: Path, split: str) -> Written:
    """ReasonSeg: a small target inside an ignored area inside a large target; the second file is in cp1252."""
    truth, videos = {}, []
    for index, encoding in enumerate(("utf-8", "cp1252")):
        name = f"{split}_{index}"
        videos.append(make_picture(name, 110 + index))
        write_frames(root / split, videos[-1])
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
    return split_of(Layout.reason_seg, root, split, videos, truth)


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
