"""The expression files of the benchmarks, read into one list of ``Expression``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.json_access import field
from glus.data.benchmarks.mevis import read_lvvis, read_mevis, read_revos
from glus.data.benchmarks.places import expression_path
from glus.data.benchmarks.reason_seg import read_reason_seg
from glus.data.benchmarks.reason_vos import read_reason_vos
from glus.data.benchmarks.refcoco import read_refcoco
from glus.data.benchmarks.youtube import read_long_rvos, read_ref_youtube_vos, read_ref_youtube_vos_valid
from glus.files import read_json
from glus.types import Expression, Video

log = logging.getLogger(__name__)

Reader = Callable[[DatasetConfig, Path], list[Expression]]
"""From a split's configuration and its expression file to its expressions."""

READERS: dict[Layout, Reader] = {
    Layout.mevis: read_mevis,
    Layout.mevis_v2: read_mevis,
    Layout.ref_youtube_vos: read_ref_youtube_vos,
    Layout.ref_youtube_vos_valid: read_ref_youtube_vos_valid,
    Layout.ref_davis17: read_ref_youtube_vos,
    Layout.revos: read_revos,
    Layout.reason_vos: read_reason_vos,
    Layout.lvvis: read_lvvis,
    Layout.long_rvos: read_long_rvos,
    Layout.refcoco: read_refcoco,
    Layout.reason_seg: read_reason_seg,
}


def read_expressions(dataset: DatasetConfig) -> list[Expression]:
    """All expressions of a split: videos in the file's order, expressions in numeric order, frames as listed.

    Expressions without objects (MeViS v2, ReVOS, splits without public masks) have empty ``object_ids`` and
    ``annotation_ids``; nothing is ever left out but the videos of another split (Ref-YouTube-VOS valid, the training
    pictures of RefCOCO) and those that ``dataset.videos`` does not name.

    Raises:
        FileNotFoundError: no expression file (or group file, or list of videos) where the layout has it.
        ValueError: the file does not have the layout's fields.
    """
    path = expression_path(dataset)
    expressions = READERS[dataset.layout](dataset, path)
    expressions = _with_groups(dataset, _of_listed_videos(dataset, expressions))
    if not expressions:
        raise ValueError(f"dataset {dataset.name!r}: {path} holds no expression")
    _check_folders(path, expressions)
    num_videos = len({expression.video for expression in expressions})
    log.info("%s: %d expressions of %d videos from %s", dataset.name, len(expressions), num_videos, path)
    return expressions


def by_video(expressions: Iterable[Expression]) -> list[Video]:
    """The expressions of each video, videos in the order of the expression file; they need not be neighbours there."""
    videos: dict[str, list[Expression]] = {}
    for expression in expressions:
        videos.setdefault(expression.video, []).append(expression)
    return [*videos.values()]


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
            "Choose a split with public masks (MeViS: train, valid_u; Ref-YouTube-VOS: train, or valid with the masks "
            "that were released later in valid/Annotations)"
        )


def trainable(expressions: Sequence[Expression], num_frames: int) -> list[Expression]:
    """The expressions whose video has at least ``num_frames`` frames; what is left out is counted in the log.

    Pictures (videos of one frame) are kept: training repeats them. Only training may leave videos out (the released
    GLUS also trains only on videos with its four query frames); prediction and scoring take all.

    Raises:
        ValueError: no video is long enough.
    """
    kept = [expression for expression in expressions if not 1 < len(expression.frames) < num_frames]
    short = sorted({f"{e.dataset}/{e.video}" for e in expressions if 1 < len(e.frames) < num_frames})
    if not kept:
        raise ValueError(f"no video has the {num_frames} query frames that training needs; shortest: {short[:3]}")
    if short:
        names = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
        log.warning(
            "training leaves out %d videos (%d expressions) with fewer than %d frames: %s",
            len(short), len(expressions) - len(kept), num_frames, names,
        )  # fmt: skip
    return kept


def _of_listed_videos(dataset: DatasetConfig, expressions: list[Expression]) -> list[Expression]:
    """Those of the videos that ``dataset.videos`` names, if it does."""
    if dataset.videos is None:
        return expressions
    path = Path(dataset.root) / dataset.videos
    if not path.is_file():
        raise FileNotFoundError(f"dataset {dataset.name!r} has no list of videos {path}; expected one id per line")
    wanted = set(path.read_text(encoding="utf-8").split())
    unknown = sorted(wanted - {expression.video for expression in expressions})
    if unknown:
        raise ValueError(f"{path} names {len(unknown)} videos that the split does not have, such as {unknown[0]!r}")
    return [expression for expression in expressions if expression.video in wanted]


def _with_groups(dataset: DatasetConfig, expressions: list[Expression]) -> list[Expression]:
    """Each with its group of the sidecar file, if the dataset has one."""
    if dataset.groups is None:
        return expressions
    path = Path(dataset.root) / dataset.split / dataset.groups
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset {dataset.name!r} has no group file {path}; expected {{video: {{exp_id: group}}}}"
        )
    groups = read_json(path)
    found = []
    for expression in expressions:
        of_video = field(groups, expression.video, dict, str(path))
        if expression.exp_id not in of_video:
            raise ValueError(f"{path} has no group for {expression.video}/{expression.exp_id}")
        found.append(replace(expression, group=of_video[expression.exp_id]))
    return found


def _check_folders(path: Path, expressions: Sequence[Expression]) -> None:
    """Predictions go where the ids say: to a folder of their own, and never out of the folder of predictions."""
    seen: dict[str, Expression] = {}
    for expression in expressions:
        place = PurePosixPath(expression.prediction_dir)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{path}: {expression.name} would be written to {place}, outside a folder of predictions")
        other = seen.setdefault(str(place), expression)
        if other is not expression:
            raise ValueError(f"{path}: {expression.name} and {other.name} would both be written to {place}")
