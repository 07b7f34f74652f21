"""Ref-YouTube-VOS, Ref-DAVIS17, Long-RVOS and ReasonVOS: expressions that name one object.

``{"videos": {video: {"frames": [...], "expressions": {exp_id: {"exp": ..., "obj_id": "1"}}}}}``. ReasonVOS has a list:
``"source": "MOSE", "expressions": [{"obj_id": "1", "exp_id": 0, "exp_text": ..., "is_sent": true}]``, whose ids repeat
for the objects of a video. What identifies one of its expressions is (source, video, object, exp_id); the released GLUS
and others take fewer of these and mix expressions up.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from glus.config import DatasetConfig
from glus.data.benchmarks.mevis import Entry, iterate_videos, read_entries
from glus.files import field, whole_number
from glus.types import Expression

log = logging.getLogger(__name__)

NUM_VIDEOS_OF_VALID_AND_TEST = 507
"""Videos in the official valid file of Ref-YouTube-VOS: 202 of valid and 305 of test."""
LONG_RVOS_TYPES = ("static", "dynamic", "hybrid")


def read_ref_youtube_vos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """Ref-YouTube-VOS train and Ref-DAVIS17: the object's id is also the value of its pixels, hence its annotation."""
    expressions = []
    for entry in read_entries(dataset.name, path):
        if "obj_id" not in entry.value:
            raise ValueError(
                f"{entry.where}: expected an 'obj_id'; Ref-YouTube-VOS names no objects in valid and test, "
                "which are read with layout=ref_youtube_vos_valid"
            )
        number = whole_number(entry.value, "obj_id", entry.where)
        if number == 0:
            raise ValueError(f"{entry.where}: obj_id 0 is the background of the masks; objects are counted from 1")
        expressions.append(replace(entry.expression, object_ids=(number,), annotation_ids=(str(number),)))
    return expressions


def read_ref_youtube_vos_valid(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """Ref-YouTube-VOS valid and test, which name no objects.

    The masks of valid that were released later lie in ``Annotations/<video>/<exp_id>/``; where that folder is, it is
    each expression's annotation. Without it expressions have none, and can only be predicted.

    Raises:
        ValueError: the official valid file without a way to tell valid from test videos.
    """
    expressions = [entry.expression for entry in read_entries(dataset.name, path)]
    if dataset.split == "valid":
        expressions = _without_test_videos(dataset, path, expressions)
    if not masks.is_dir():
        return expressions
    return [replace(found, annotation_ids=(f"{found.video}/{found.exp_id}",)) for found in expressions]


def read_long_rvos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """Long-RVOS: an object's masks lie in ``Annotations/<video>/<obj_id>/``; the group of an expression is its type."""
    return [_long_rvos(entry) for entry in read_entries(dataset.name, path, "obj_id")]


def read_reason_vos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """ReasonVOS: ids become ``<obj_id>_<exp_id>``; predictions lie in ``<source>_<video>_<obj_id>/<exp_id>``.

    Raises:
        ValueError: an object of a video has an ``exp_id`` twice, or a field is missing.
    """
    expressions: dict[str, Expression] = {}
    for video, frames, content, place in iterate_videos(path):
        source = field(content, "source", str, place)
        for index, value in enumerate(field(content, "expressions", list, place)):
            where = f"{place}.expressions[{index}]"
            text = field(value, "exp_text", str, where)
            object_id, number = whole_number(value, "obj_id", where), whole_number(value, "exp_id", where)
            annotation = f"{source}_{video}_{value['obj_id']}"  # as spelled: it is the name of a folder
            folder, exp_id = f"{annotation}/{value['exp_id']}", f"{object_id}_{number}"
            if folder in expressions:
                raise ValueError(f"{where}: {folder} stands there twice")
            expressions[folder] = Expression(
                dataset.name, video, exp_id, text, frames, (object_id,), (annotation,), folder=folder
            )
    return list(expressions.values())


def _long_rvos(entry: Entry) -> Expression:
    group = entry.value.get("type")
    if group not in LONG_RVOS_TYPES:
        raise ValueError(f"{entry.where}: expected {' or '.join(LONG_RVOS_TYPES)} under 'type', found {group!r}")
    expression = replace(entry.expression, group=group)
    if "obj_id" not in entry.value:
        return expression
    number, annotation = whole_number(entry.value, "obj_id", entry.where), f"{expression.video}/{entry.value['obj_id']}"
    return replace(expression, object_ids=(number,), annotation_ids=(annotation,))


def _without_test_videos(dataset: DatasetConfig, path: Path, expressions: list[Expression]) -> list[Expression]:
    """The official valid file also lists the test videos: those of the test file, where that is present."""
    num_videos = len({expression.video for expression in expressions})
    test_file = Path(dataset.root) / "meta_expressions" / "test" / "meta_expressions.json"
    if test_file.is_file():
        test = {video for video, *_ in iterate_videos(test_file)}
        kept = [expression for expression in expressions if expression.video not in test]
        num_test = num_videos - len({expression.video for expression in kept})
        log.info("%s: %d of the %d videos listed belong to test", dataset.name, num_test, num_videos)
        return kept
    if num_videos == NUM_VIDEOS_OF_VALID_AND_TEST and dataset.videos is None:
        raise ValueError(
            f"{path} lists all {num_videos} videos of valid and test, and nothing tells which 202 are valid: put the "
            f"test file at {test_file}, or name a file with the 202 ids (one a line, below root) as dataset.videos"
        )
    return expressions
