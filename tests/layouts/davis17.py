"""Ref-DAVIS17 as converted, and what is downloaded before the conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from glus.config import Layout
from tests.layouts.splits import Truth, Written, split_of, write_expressions, write_frames, write_palettes
from tests.layouts.videos import Video, make_video, object_ids, visible_parts

VOID_ROWS = 3
"""Lowest rows of every frame, which are void (255)."""


def write_ref_davis17(root: Path, split: str) -> Written:
    """Ref-DAVIS17 as converted: four sentences per object, the lowest rows void."""
    videos = [make_video(f"{split}-{i}", 50 + i) for i in range(2)]
    truth = {}
    for video in videos:
        write_frames(root / split / "JPEGImages" / video.name, video)
        ids, void = davis_ids(video)
        write_palettes(root / split / "Annotations" / video.name, video.frames, ids)
        for number in range(12):
            object_id = number // 4 + 1
            truth[video.name, str(number)] = Truth(
                f"disk {object_id} by {number % 4}", ids == object_id, (object_id,), ignore_THW=void
            )
    values = {key: {"exp": t.text, "obj_id": str(t.object_ids[0])} for key, t in truth.items()}
    write_expressions(root / "meta_expressions" / split / "meta_expressions.json", videos, values)
    return split_of(Layout.ref_davis17, root, split, videos, truth)


def davis_ids(video: Video) -> tuple[np.ndarray, np.ndarray]:
    """Object ids as DAVIS has them, (T, H, W) uint8, all in the first frame; and where they are void, bool."""
    objects = video.objects_OTHW.copy()
    objects[2, 0] = objects[2, 1]
    ids = object_ids(visible_parts(objects))
    void = np.zeros(ids.shape, bool)
    void[:, -VOID_ROWS:] = True
    ids[void] = 255
    return ids, void


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
            write_frames(root / "DAVIS/JPEGImages/480p" / name, video)
            write_palettes(root / "DAVIS/Annotations_unsupervised/480p" / name, video.frames, davis_ids(video)[0])
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
