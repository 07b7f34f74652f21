"""``meta_expressions.json`` in its forms: MeViS and its kin, Ref-YouTube-VOS and its kin, ReasonVOS.

- Expressions that list their objects and annotations (MeViS 1 and 2, ReVOS, Ref-SAV, LV-VIS): ``{"videos": {video:
  {"frames": [...], "expressions": {exp_id: {"exp": ..., "obj_id": [...], "anno_id": [...]}}}}}``. An annotation id
  addresses an entry of ``mask_dict.json``. Both lists are empty where nothing fits the sentence (MeViS 2, ReVOS), and
  left out where the masks are not public.
- Expressions that name one object (Ref-YouTube-VOS, Ref-DAVIS17, Long-RVOS): ``{"exp": ..., "obj_id": "1"}``.
- ReasonVOS has a list: ``"source": "MOSE", "expressions": [{"obj_id": "1", "exp_id": 0, "exp_text": ..., "is_sent":
  true}]``, whose ids repeat for the objects of a video. What identifies one of its expressions is (source, video,
  object, exp_id); the released GLUS and others take fewer of these and mix expressions up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.files import field, read_json, whole_number
from glus.types import Expression

log = logging.getLogger(__name__)

REVOS_GROUPS = ("referring", "reasoning", "non-existent")
"""What ReVOS' ``type_id`` 0, 1 and 2 mean."""
REF_SAV_GROUPS = ("long", "short")
"""What Ref-SAV's ``type_id`` 0 and 1 mean: descriptions of an object, of many words and of few."""
LONG_RVOS_TYPES = ("static", "dynamic", "hybrid")
NUM_VIDEOS_OF_VALID_AND_TEST = 507
"""Videos in the official valid file of Ref-YouTube-VOS: 202 of valid and 305 of test."""
Entry = tuple[Expression, dict[str, Any], str]
"""One expression of a file in which videos hold frames and expressions by id: what all such files say about it (neither
objects nor group), all that this one says, and its place, for messages."""


def iterate_videos(path: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any], str]]:
    """(video, its frames as the file spells them, its content, its place for messages) of an expression file.

    Raises:
        ValueError: there are no ``videos``, or one has no frames, one twice, or anything but text.
    """
    for video, content in field(read_json(path), "videos", dict, str(path)).items():
        where = f"{path}: videos[{video!r}]"
        frames = field(content, "frames", list, where)
        if not frames or len(set(map(str, frames))) != len(frames) or not all(isinstance(name, str) for name in frames):
            raise ValueError(f"{where}.frames: expected distinct frame names, found {frames[:5]}")
        yield video, tuple(frames), content, where


def read_entries(dataset: str, path: Path, all_or_none: str = "exp") -> list[Entry]:
    """The expressions of ``{"videos": {video: {frames: [...], expressions: {exp_id: {exp: ...}}}}}``.

    Videos in the file's order, expressions in numeric order ("2" before "10") where all are numbers.

    Args:
        dataset: its name.
        path: the file.
        all_or_none: a key that a split has in every expression or in none: a single gap would be taken for "no object".

    Raises:
        ValueError: a field is missing or of another type, or some expressions have that key and others have not.
    """
    entries: list[Entry] = []
    for video, frames, content, where in iterate_videos(path):
        expressions = field(content, "expressions", dict, where)
        for exp_id in sorted(expressions, key=int) if all(map(str.isdecimal, expressions)) else expressions:
            value, inside = expressions[exp_id], f"{where}.expressions[{exp_id!r}]"
            text = field(value, "exp", str, inside)
            entries.append((Expression(dataset, video, exp_id, text, frames, (), ()), value, inside))
    without = [found for found, value, _ in entries if all_or_none not in value]
    if 0 < len(without) < len(entries):
        first = f"{without[0].video}/{without[0].exp_id}"
        raise ValueError(f"{path}: {len(without)} expressions have no {all_or_none!r} though others do; first: {first}")
    return entries


def read_mevis(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """MeViS 1 and 2."""
    return [_with_lists(*entry) for entry in read_entries(dataset.name, path, "obj_id")]


def read_lvvis(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """LV-VIS: the sentence is the name of a category, whose underscores become spaces (as in VISA)."""
    return [replace(found, text=found.text.replace("_", " ")) for found in read_mevis(dataset, path, masks)]


def read_typed(dataset: DatasetConfig, path: Path, _masks: Path, groups: Sequence[str]) -> list[Expression]:
    """ReVOS and Ref-SAV: the group of an expression is its ``type_id``. Ids of ReVOS' videos contain slashes.

    Source of Ref-SAV: bytedance/Sa2VA, tools/eval/eval_ref_sav.py (fields, groups),
    projects/sa2va/evaluation/ref_vos_eval.py (places); the frames are ``videos/<video>/<frame>.jpg`` in
    PolyU-ChenLab/UniPixel as well.
    """
    expressions = []
    for found, value, where in read_entries(dataset.name, path, "obj_id"):
        number = whole_number(value, "type_id", where)
        if number >= len(groups):
            raise ValueError(f"{where}: type_id {number}; expected 0 to {len(groups) - 1} ({', '.join(groups)})")
        expressions.append(replace(_with_lists(found, value, where), group=groups[number]))
    return expressions


def read_ref_youtube_vos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """Ref-YouTube-VOS train and Ref-DAVIS17: the object's id is also the value of its pixels, hence its annotation."""
    expressions = []
    for found, value, where in read_entries(dataset.name, path):
        if "obj_id" not in value:
            raise ValueError(
                f"{where}: expected an 'obj_id'; Ref-YouTube-VOS names no objects in valid and test, "
                "which are read with layout=ref_youtube_vos_valid"
            )
        number = whole_number(value, "obj_id", where)
        if number == 0:
            raise ValueError(f"{where}: obj_id 0 is the background of the masks; objects are counted from 1")
        expressions.append(replace(found, object_ids=(number,), annotation_ids=(str(number),)))
    return expressions


def read_ref_youtube_vos_valid(dataset: DatasetConfig, path: Path, masks: Path) -> list[Expression]:
    """Ref-YouTube-VOS valid and test, which name no objects.

    The masks of valid that were released later lie in ``Annotations/<video>/<exp_id>/``; where that folder is, it is
    each expression's annotation. Without it expressions have none, and can only be predicted.

    Raises:
        ValueError: the official valid file without a way to tell valid from test videos.
    """
    expressions = [found for found, *_ in read_entries(dataset.name, path)]
    if dataset.split == "valid":
        expressions = _without_test_videos(dataset, path, expressions)
    if not masks.is_dir():
        return expressions
    return [replace(found, annotation_ids=(f"{found.video}/{found.exp_id}",)) for found in expressions]


def read_long_rvos(dataset: DatasetConfig, path: Path, _masks: Path) -> list[Expression]:
    """Long-RVOS: an object's masks lie in ``Annotations/<video>/<obj_id>/``; the group of an expression is its type.

    Types are for tables of scores: in ``train``, whose official reader does not look at them, they may be absent.
    """
    allowed = (*LONG_RVOS_TYPES, "") if dataset.split == "train" else LONG_RVOS_TYPES
    expressions = []
    for found, value, where in read_entries(dataset.name, path, "obj_id"):
        group = value.get("type", "")
        if group not in allowed:
            raise ValueError(f"{where}: expected {' or '.join(LONG_RVOS_TYPES)} under 'type', found {group!r}")
        found = replace(found, group=group)
        if "obj_id" in value:
            number = whole_number(value, "obj_id", where)
            annotation = f"{found.video}/{value['obj_id']}"  # as spelled: it is the name of a folder
            found = replace(found, object_ids=(number,), annotation_ids=(annotation,))
        expressions.append(found)
    return expressions


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


def _with_lists(found: Expression, value: dict[str, Any], where: str) -> Expression:
    objects, annotations = (_ids(value, key, where) for key in ("obj_id", "anno_id"))
    if len(objects) != len(annotations):
        raise ValueError(f"{where}: {len(objects)} obj_id but {len(annotations)} anno_id; expected as many of both")
    return replace(found, object_ids=tuple(map(int, objects)), annotation_ids=annotations)


def _ids(value: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """As spelled: they are keys of ``mask_dict.json``."""
    ids = value.get(key, [])
    if not isinstance(ids, list) or not all(str(i).isdecimal() for i in ids):
        raise ValueError(f"{where}: expected a list of whole numbers under {key!r}, found {ids!r:.80}")
    return tuple(map(str, ids))


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
