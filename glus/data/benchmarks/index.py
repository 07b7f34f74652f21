"""The benchmarks: a row for each says where its files are and who reads them, into one list of ``Expression``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.groundmore import FRAME_FOLDER, GroundMoreMasks, read_groundmore
from glus.data.benchmarks.meta_expressions import (
    REF_SAV_GROUPS,
    REVOS_GROUPS,
    read_long_rvos,
    read_lvvis,
    read_mevis,
    read_reason_vos,
    read_ref_youtube_vos,
    read_ref_youtube_vos_valid,
    read_typed,
)
from glus.data.benchmarks.outlines import REFS, PolygonMasks, ShapeMasks, read_reason_seg, read_refcoco
from glus.data.masks import MaskStore, RleMasks
from glus.data.png_masks import FolderMasks, PaletteMasks
from glus.files import field, read_json
from glus.types import Expression, Video, require_utf8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """The files of a benchmark as it is officially distributed; ``{split}`` stands for the name of the split."""

    read: Callable[[DatasetConfig, Path, Path], list[Expression]]
    """From a split's configuration, its expression file and its masks to its expressions."""
    open_masks: Callable[[str, Path], MaskStore]
    """From the dataset's name and its masks to their store."""
    expressions: tuple[str, ...]
    """Names below ``root`` that the expression file is known to have, the first that exists counts."""
    masks: str
    """File or folder of the masks below ``root``."""
    images: str = "{split}/JPEGImages"
    """Folder of the frames below ``root``."""
    frame_folder: str = "{video}"
    """Folder of a video's frames below that; empty: they lie in it itself (pictures, each a video of one frame)."""
    zip_folder: str | None = None
    """What stands before ``<video>/`` in the zip for the benchmark's server; None if it has none."""


_JSON, _RLE, _PNG = "{split}/meta_expressions.json", "{split}/mask_dict.json", "{split}/Annotations"
_V2 = ("{split}/meta_expressions_v2.json", "{split}/meta_expressions_v2_release.json")
_YOUTUBE = ("meta_expressions/{split}/meta_expressions.json",)
_OBJECTS, _SENTENCES = partial(FolderMasks, absent_is_empty=True), partial(FolderMasks, absent_is_empty=False)
_REVOS, _REF_SAV = partial(read_typed, groups=REVOS_GROUPS), partial(read_typed, groups=REF_SAV_GROUPS)
_TRAIN2014 = "../images/mscoco/images/train2014"

LAYOUTS: dict[Layout, Benchmark] = {
    Layout.mevis: Benchmark(read_mevis, RleMasks, (_JSON,), _RLE, zip_folder=""),
    Layout.mevis_v2: Benchmark(read_mevis, RleMasks, (*_V2, _JSON), _RLE, zip_folder=""),
    Layout.ref_youtube_vos: Benchmark(read_ref_youtube_vos, PaletteMasks, _YOUTUBE, _PNG),
    Layout.ref_youtube_vos_valid: Benchmark(
        read_ref_youtube_vos_valid, _SENTENCES, _YOUTUBE, _PNG, zip_folder="Annotations/"
    ),
    Layout.ref_davis17: Benchmark(read_ref_youtube_vos, PaletteMasks, _YOUTUBE, _PNG),
    Layout.revos: Benchmark(_REVOS, RleMasks, ("meta_expressions_{split}_.json",), "mask_dict.json", "JPEGImages"),
    Layout.reason_vos: Benchmark(read_reason_vos, _SENTENCES, ("meta_expressions.json",), "Annotations", "JPEGImages"),
    Layout.lvvis: Benchmark(read_lvvis, RleMasks, (_JSON,), _RLE),
    Layout.long_rvos: Benchmark(read_long_rvos, _OBJECTS, (_JSON,), _PNG),
    Layout.refcoco: Benchmark(read_refcoco, PolygonMasks, REFS, "instances.json", _TRAIN2014, frame_folder=""),
    Layout.ref_sav: Benchmark(_REF_SAV, RleMasks, ("meta_expressions_{split}.json",), "mask_dict.json", "videos"),
    Layout.groundmore: Benchmark(
        read_groundmore, GroundMoreMasks, ("{split}_v2.json",), "annotations", "annotations", "{video}/" + FRAME_FOLDER
    ),
    Layout.reason_seg: Benchmark(read_reason_seg, ShapeMasks, ("{split}",), "{split}", "{split}", frame_folder=""),
}
"""MeViS' version 2 has file names of its own, but its documents also speak of version 1's; whose a file then is tells
the warning of ``read_expressions``."""


def expression_path(dataset: DatasetConfig) -> Path:
    """The expression file of a split (ReasonSeg: the folder of its files).

    Raises:
        FileNotFoundError: it is at none of the layout's places.
    """
    names = LAYOUTS[dataset.layout].expressions if dataset.expressions is None else (dataset.expressions,)
    candidates = [_below_root(dataset, name) for name in names]
    for path in candidates:
        if path.exists():
            return path
    beside = sorted(candidates[0].parent.glob(f"{candidates[0].stem}*"))  # of another version
    raise FileNotFoundError(
        f"dataset {dataset.name!r} ({dataset.layout.value} layout) has no expression file; "
        f"expected {' or '.join(str(path) for path in candidates)}{f'; there is {beside[0].name}' if beside else ''}"
    )


def image_folder(dataset: DatasetConfig) -> Path:
    """The folder of a split's frames."""
    return _below_root(dataset, dataset.images or LAYOUTS[dataset.layout].images)


def mask_path(dataset: DatasetConfig) -> Path:
    """The file or folder of a split's masks."""
    return _below_root(dataset, dataset.masks or LAYOUTS[dataset.layout].masks)


def open_masks(dataset: DatasetConfig) -> MaskStore:
    """The mask store of a split; it reads nothing before the first mask is asked for."""
    return LAYOUTS[dataset.layout].open_masks(dataset.name, mask_path(dataset))


def _below_root(dataset: DatasetConfig, name: str) -> Path:
    return Path(os.path.normpath(Path(dataset.root) / name.replace("{split}", dataset.split)))


def read_expressions(dataset: DatasetConfig) -> list[Expression]:
    """All expressions of a split: videos in the file's order, expressions in numeric order, frames as listed.

    Expressions without objects (MeViS v2, ReVOS, splits without public masks) have empty ``object_ids`` and
    ``annotation_ids``; nothing is ever left out but the videos of another split (Ref-YouTube-VOS valid, the training
    pictures of RefCOCO) and those that ``dataset.videos`` does not name. Warns where there are not as many as
    ``dataset.expected`` says: of another version, say.

    Raises:
        FileNotFoundError: no expression file (or group file, or list of videos) where the layout has it.
        ValueError: the file does not have the layout's fields.
    """
    path = expression_path(dataset)
    expressions = LAYOUTS[dataset.layout].read(dataset, path, mask_path(dataset))
    expressions = _with_groups(dataset, _of_listed_videos(dataset, expressions))
    if not expressions:
        raise ValueError(f"dataset {dataset.name!r}: {path} holds no expression")
    _check_folders(path, expressions)
    counts = count_split(expressions)
    log.info("%s: %d expressions of %d videos from %s", dataset.name, len(expressions), counts["videos"], path)
    for name, published in vars(dataset.expected).items():
        if published not in (None, counts[name]):
            log.warning("%s: %d %s in %s, but published are %d", dataset.name, counts[name], name, path, published)
    return expressions


def count_split(expressions: Sequence[Expression]) -> dict[str, int]:
    """Numbers of videos, expressions, objects and frames, by their names in ``dataset.expected``."""
    frames = {expression.video: expression.frames for expression in expressions}
    return {
        "videos": len(frames),
        "expressions": len(expressions),
        "objects": len({(e.video, object_id) for e in expressions for object_id in e.object_ids}),
        "frames": sum(map(len, frames.values())),
    }


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


def require_texts(expressions: Iterable[Expression]) -> None:
    """Stop before anything is loaded where a sentence cannot be tokenized; scoring and checking do not ask for that.

    Raises:
        ValueError: one is no text; the message names it.
    """
    for expression in expressions:
        require_utf8(expression.text, f"the sentence of {expression.name}")


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
    wanted = _lines(path)
    known = {expression.video for expression in expressions}
    unknown = sorted(line for line in wanted - known if not line.startswith("#"))
    if unknown:
        raise ValueError(f"{path} names {len(unknown)} videos that the split does not have, such as {unknown[0]!r}")
    return [expression for expression in expressions if expression.video in wanted]


def _lines(path: Path) -> set[str]:
    """What the lines of a text file hold, but for those without anything."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    return {line.strip() for line in text.replace("\r", "\n").split("\n")} - {""}


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
