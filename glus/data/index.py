"""The expression files of the benchmarks, read into one list of ``Expression``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glus.config import DatasetConfig, Layout
from glus.structures import Expression

log = logging.getLogger(__name__)

MEVIS_FILES = ("meta_expressions.json", "meta_expressions_v2.json", "meta_expressions_v2_release.json")
"""Names of MeViS' expression file: version 1, version 2, and version 2 of the splits without public masks."""

Objects = tuple[tuple[int, ...], tuple[str, ...]]
"""Object ids and annotation ids of one expression."""


def read_expressions(dataset: DatasetConfig) -> list[Expression]:
    """All expressions of a split: videos in the file's order, expressions in numeric order, frames as listed.

    Expressions without objects (MeViS v2, splits without public masks) have empty ``object_ids`` and
    ``annotation_ids``; nothing is ever left out.

    Raises:
        FileNotFoundError: no expression file (or group file) where the layout has it.
        ValueError: the file does not have the layout's fields.
    """
    path = _expression_file(dataset)
    videos = _field(_read_json(path), "videos", dict, str(path))
    if dataset.layout is Layout.ref_youtube_vos:
        videos = _without_test_videos(dataset, videos)
    groups = _read_groups(dataset)
    expressions: list[Expression] = []
    for video, entry in videos.items():
        where = f"{path}: videos[{video!r}]"
        frames = tuple(str(name) for name in _field(entry, "frames", list, where))
        if not frames or len(set(frames)) != len(frames):
            raise ValueError(f"{where}.frames: expected distinct frame names, found {list(frames)[:5]}")
        for exp_id, value in _numeric_order(_field(entry, "expressions", dict, where)):
            inside = f"{where}.expressions[{exp_id!r}]"
            text = _field(value, "exp", str, inside)
            object_ids, annotation_ids = OBJECTS[dataset.layout](value, inside)
            group = _group(groups, dataset, video, exp_id)
            expressions.append(Expression(dataset.name, video, exp_id, text, frames, object_ids, annotation_ids, group))
    if not expressions:
        raise ValueError(f"dataset {dataset.name!r}: {path} holds no expression")
    _check_all_or_none(path, videos)
    log.info("%s: %d expressions of %d videos from %s", dataset.name, len(expressions), len(videos), path)
    return expressions


def require_annotations(dataset: DatasetConfig, expressions: Sequence[Expression]) -> None:
    """Stop where a split cannot be trained on or scored because its masks are not public.

    A single expression without objects is legal (nothing in the video fits it); a whole split of them is not.

    Raises:
        ValueError: no expression of the split has an annotation.
    """
    if not any(expression.annotation_ids for expression in expressions):
        raise ValueError(
            f"dataset {dataset.name!r}, split {dataset.split!r} below {dataset.root}: none of its {len(expressions)} "
            "expressions has objects or annotations; this split cannot be trained on or scored. "
            "Choose a split with public masks (MeViS: train, valid_u; Ref-YouTube-VOS: train)"
        )


def trainable(expressions: Sequence[Expression], num_frames: int) -> list[Expression]:
    """The expressions whose video has at least ``num_frames`` frames; what is left out is counted in the log.

    Only training may leave videos out (the released GLUS also trains only on videos with its four query frames);
    prediction and scoring take all.

    Raises:
        ValueError: no video is long enough.
    """
    kept = [expression for expression in expressions if len(expression.frames) >= num_frames]
    short = sorted({f"{e.dataset}/{e.video}" for e in expressions if len(e.frames) < num_frames})
    if not kept:
        raise ValueError(f"no video has the {num_frames} query frames that training needs; shortest: {short[:3]}")
    if short:
        names = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
        log.warning(
            "training leaves out %d videos (%d expressions) with fewer than %d frames: %s",
            len(short), len(expressions) - len(kept), num_frames, names,
        )  # fmt: skip
    return kept


def _expression_file(dataset: DatasetConfig) -> Path:
    root = Path(dataset.root)
    if dataset.expressions is not None:
        candidates = [root / dataset.expressions]
    elif dataset.layout is Layout.mevis:
        candidates = [root / dataset.split / name for name in MEVIS_FILES]
    else:
        candidates = [root / "meta_expressions" / dataset.split / "meta_expressions.json"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"dataset {dataset.name!r} ({dataset.layout.value} layout) has no expression file; "
        f"expected {' or '.join(str(path) for path in candidates)}"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _field(mapping: Any, key: str, kind: type, where: str) -> Any:
    """``mapping[key]``, checked to be of type ``kind``."""
    if not isinstance(mapping, dict) or not isinstance(mapping.get(key), kind):
        found = type(mapping.get(key)).__name__ if isinstance(mapping, dict) and key in mapping else "nothing"
        raise ValueError(f"{where}: expected a {kind.__name__} under {key!r}, found {found}")
    return mapping[key]


def _numeric_order(expressions: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Items in numeric order of their keys where all are numbers ("2" before "10"), else in file order."""
    if all(key.isdecimal() for key in expressions):
        return sorted(expressions.items(), key=lambda item: int(item[0]))
    return expressions.items()


def _mevis_objects(value: dict[str, Any], where: str) -> Objects:
    """MeViS: parallel lists ``obj_id`` and ``anno_id``; both empty or both left out where there is no object."""
    object_ids, annotation_ids = value.get("obj_id", []), value.get("anno_id", [])
    for key, ids in (("obj_id", object_ids), ("anno_id", annotation_ids)):
        if not isinstance(ids, list):
            raise ValueError(f"{where}: expected a list under {key!r}, found {ids!r}")
    if len(object_ids) != len(annotation_ids):
        raise ValueError(f"{where}: {len(object_ids)} obj_id but {len(annotation_ids)} anno_id; expected as many")
    return tuple(int(i) for i in object_ids), tuple(str(i) for i in annotation_ids)


def _ref_youtube_vos_objects(value: dict[str, Any], where: str) -> Objects:
    """Ref-YouTube-VOS: one ``obj_id``, a string, which is also the value of its pixels; left out in valid and test."""
    if "obj_id" not in value:
        return (), ()
    object_id = value["obj_id"]
    if not str(object_id).isdecimal():
        raise ValueError(f"{where}: expected a whole number under 'obj_id', found {object_id!r}")
    return (int(object_id),), (str(int(object_id)),)


OBJECTS: dict[Layout, Callable[[dict[str, Any], str], Objects]] = {
    Layout.mevis: _mevis_objects,
    Layout.ref_youtube_vos: _ref_youtube_vos_objects,
}


def _check_all_or_none(path: Path, videos: dict[str, Any]) -> None:
    """A split names the objects of every expression or of none: a single gap would be taken for "no object"."""

    def named() -> Iterator[tuple[str, bool]]:
        for video, entry in videos.items():
            for exp_id, value in entry["expressions"].items():
                yield f"{video}/{exp_id}", "obj_id" in value

    without = [name for name, has_objects in named() if not has_objects]
    if without and any(has_objects for _, has_objects in named()):
        raise ValueError(f"{path}: {len(without)} expressions have no 'obj_id' though others do; first: {without[0]}")


def _without_test_videos(dataset: DatasetConfig, videos: dict[str, Any]) -> dict[str, Any]:
    """The official valid file also lists the test videos; they are those of the test file, where that is present."""
    test_file = Path(dataset.root) / "meta_expressions" / "test" / "meta_expressions.json"
    if dataset.split != "valid" or not test_file.is_file():
        return videos
    test = _field(_read_json(test_file), "videos", dict, str(test_file))
    kept = {video: entry for video, entry in videos.items() if video not in test}
    if len(kept) < len(videos):
        log.info("%s: %d of the %d videos listed belong to test", dataset.name, len(videos) - len(kept), len(videos))
    return kept


def _read_groups(dataset: DatasetConfig) -> dict[str, dict[str, str]] | None:
    if dataset.groups is None:
        return None
    path = Path(dataset.root) / dataset.split / dataset.groups
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset {dataset.name!r} has no group file {path}; expected {{video: {{exp_id: group}}}}"
        )
    groups = _read_json(path)
    if not isinstance(groups, dict):
        raise ValueError(f"{path}: expected {{video: {{exp_id: group}}}}, found a {type(groups).__name__}")
    return groups


def _group(groups: dict[str, dict[str, str]] | None, dataset: DatasetConfig, video: str, exp_id: str) -> str:
    if groups is None:
        return ""
    if exp_id not in groups.get(video, {}):
        raise ValueError(f"{dataset.root}/{dataset.split}/{dataset.groups} has no group for {video}/{exp_id}")
    return groups[video][exp_id]
