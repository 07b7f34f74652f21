"""Ref-YouTube-VOS, Ref-DAVIS17 and Long-RVOS: expressions that name one object.

``{"videos": {video: {"frames": [...], "expressions": {exp_id: {"exp": ..., "obj_id": "1"}}}}}``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.data.benchmarks.json_access import read_entries, read_videos, require_all_or_none, whole_number
from glus.data.benchmarks.places import mask_path
from glus.types import Expression

log = logging.getLogger(__name__)

NUM_VIDEOS_OF_VALID_AND_TEST = 507
"""Videos in the official valid file of Ref-YouTube-VOS: 202 of valid and 305 of test."""
LONG_RVOS_TYPES = ("static", "dynamic", "hybrid")


def read_ref_youtube_vos(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """Ref-YouTube-VOS train and Ref-DAVIS17: the object's id is also the value of its pixels, hence its annotation."""
    expressions = []
    for entry in read_entries(path, read_videos(path)):
        if "obj_id" not in entry.value:
            raise ValueError(
                f"{entry.where}: expected an 'obj_id'; Ref-YouTube-VOS names no objects in valid and test, "
                "which are read with layout=ref_youtube_vos_valid"
            )
        number = whole_number(entry.value, "obj_id", entry.where)
        expressions.append(
            Expression(dataset.name, entry.video, entry.exp_id, entry.text, entry.frames, (number,), (str(number),))
        )
    return expressions


def read_ref_youtube_vos_valid(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """Ref-YouTube-VOS valid and test, which name no objects.

    The masks of valid that were released later lie in ``Annotations/<video>/<exp_id>/``; where that folder is, it is
    each expression's annotation. Without it expressions have none, and can only be predicted.

    Raises:
        ValueError: the official valid file without a way to tell valid from test videos.
    """
    videos = _without_test_videos(dataset, path, read_videos(path))
    has_masks = mask_path(dataset).is_dir()
    return [
        Expression(
            dataset.name, entry.video, entry.exp_id, entry.text, entry.frames,
            object_ids=(), annotation_ids=(f"{entry.video}/{entry.exp_id}",) if has_masks else (),
        )
        for entry in read_entries(path, videos)
    ]  # fmt: skip


def read_long_rvos(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """Long-RVOS: an object's masks lie in ``Annotations/<video>/<obj_id>/``; the group of an expression is its type."""
    entries = list(read_entries(path, read_videos(path)))
    require_all_or_none(path, entries, "obj_id")
    expressions = []
    for entry in entries:
        group = entry.value.get("type")
        if group not in LONG_RVOS_TYPES:
            raise ValueError(f"{entry.where}: expected {' or '.join(LONG_RVOS_TYPES)} under 'type', found {group!r}")
        objects: tuple[int, ...] = ()
        if "obj_id" in entry.value:
            objects = (whole_number(entry.value, "obj_id", entry.where),)
        annotations = tuple(f"{entry.video}/{entry.value['obj_id']}" for _ in objects)
        expressions.append(
            Expression(dataset.name, entry.video, entry.exp_id, entry.text, entry.frames, objects, annotations, group)
        )
    return expressions


def _without_test_videos(dataset: DatasetConfig, path: Path, videos: dict[str, Any]) -> dict[str, Any]:
    """The official valid file also lists the test videos: those of the test file, where that is present."""
    if dataset.split != "valid":
        return videos
    test_file = Path(dataset.root) / "meta_expressions" / "test" / "meta_expressions.json"
    if test_file.is_file():
        test = read_videos(test_file)
        kept = {video: entry for video, entry in videos.items() if video not in test}
        log.info("%s: %d of the %d videos listed belong to test", dataset.name, len(videos) - len(kept), len(videos))
        return kept
    if len(videos) == NUM_VIDEOS_OF_VALID_AND_TEST and dataset.videos is None:
        raise ValueError(
            f"{path} lists all {len(videos)} videos of valid and test, and nothing tells which 202 are valid: put the "
            f"test file at {test_file}, or name a file with the 202 ids (one a line, below root) as dataset.videos"
        )
    return videos
