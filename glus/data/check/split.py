"""The checks of a split: its files, its expressions, and the videos one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from glus.config import DatasetConfig
from glus.data.benchmarks.index import by_video, expression_path, image_folder, mask_path, open_masks, read_expressions
from glus.data.check.findings import Check, Report, Row
from glus.data.check.video import VideoChecker, VideoFindings
from glus.data.masks import RleMasks
from glus.data.outline_masks import PolygonMasks
from glus.data.parallel import map_in_processes
from glus.types import Expression

Progress = Callable[[int, int], None]
"""Called with the number of videos checked so far, and of all."""


def check_dataset(
    dataset: DatasetConfig,
    against: Sequence[DatasetConfig] = (),
    alignment: bool = False,
    num_workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Everything that can be told to be wrong with a split on disk. Nothing of the dataset is changed.

    Args:
        dataset: the split; its ``expected`` counts and ``sha256`` are what it is held against.
        against: splits with which it must not share a video.
        alignment: also test whether masks lie on the objects of their own frames, which reads every frame again.
        num_workers: processes; what is found does not depend on it.
        progress: is told how far it is.

    Raises:
        FileNotFoundError, ValueError: the expression file of a split in ``against`` cannot be read.
        OSError: the masks cannot be packed anywhere (see ``mask_cache``), or a process died.
    """
    rows = {check: Row(skipped="needs the expression file") for check in Check}
    report = Report(dataset.name, dataset.layout.value, dataset.split, dataset.root, rows)
    rows[Check.checksums] = check_checksums(dataset)
    try:
        expressions = read_expressions(dataset)
    except FileNotFoundError as error:
        rows[Check.files] = Row("expression file", errors=[str(error)])
        return report
    except ValueError as error:
        rows[Check.files] = Row(str(expression_path(dataset)))
        rows[Check.sentences] = Row("expression file", errors=[str(error)])
        return report
    names_objects = any(expression.annotation_ids for expression in expressions)
    no_frames, no_masks = _why_no_frames(dataset), _why_no_masks(dataset) if names_objects else ""
    rows[Check.files] = Row("expression file, frames, masks", errors=[line for line in (no_frames, no_masks) if line])
    if not names_objects:
        message = f"{dataset.split} names no objects: it can be predicted, but not scored or trained on"
        rows[Check.files] = Row("expression file, frames", errors=rows[Check.files].errors, warnings=[message])
    rows[Check.counts] = check_counts(dataset, expressions)
    rows[Check.sentences] = check_sentences(dataset, expressions)
    rows[Check.leaks] = check_leaks(expressions, against)
    open_checker = partial(VideoChecker, dataset, not no_frames, names_objects and not no_masks, alignment)
    rows |= check_videos(open_checker, expressions, num_workers, progress)
    return report


def check_checksums(dataset: DatasetConfig) -> Row:
    """SHA-256 of the files for which the config has one."""
    if not dataset.sha256:
        return Row(skipped="none is known")
    row = Row(f"{len(dataset.sha256)} files")
    for name, expected in dataset.sha256.items():
        path = Path(dataset.root) / name
        if not path.is_file():
            row.errors.append(f"{path} is missing; expected the file of SHA-256 {expected}")
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.lower():
            row.errors.append(f"{path} has SHA-256 {found}; expected {expected}")
    return row


def check_counts(dataset: DatasetConfig, expressions: Sequence[Expression]) -> Row:
    """Numbers of videos, expressions, objects and frames that the files name, against the published ones."""
    frames = {expression.video: expression.frames for expression in expressions}
    found = {
        "videos": len(frames),
        "expressions": len(expressions),
        "objects": len({(e.video, object_id) for e in expressions for object_id in e.object_ids}),
        "frames": sum(map(len, frames.values())),
    }
    expected = vars(dataset.expected)
    row = Row(", ".join(f"{count:,} {name}" for name, count in found.items()))
    row.errors = [
        f"{found[name]:,} {name} in {expression_path(dataset)}; published are {count:,}"
        for name, count in expected.items()
        if count is not None and count != found[name]
    ]
    if all(count is None for count in expected.values()):
        row.skipped = "none are known"
    return row


def check_sentences(dataset: DatasetConfig, expressions: Sequence[Expression]) -> Row:
    """Whether every expression has words, and ids always mean the same."""
    row = Row(f"{len(expressions):,} expressions")
    is_global = isinstance(open_masks(dataset), RleMasks)  # an annotation is one object of one video
    videos: dict[str, Expression] = {}
    annotations: dict[tuple[str, int], tuple[str, Expression]] = {}
    for expression in expressions:
        if not expression.text.strip():
            row.errors.append(f"{expression.name} has no text")
        for object_id, annotation_id in zip(expression.object_ids, expression.annotation_ids, strict=False):
            known, first = annotations.setdefault((expression.video, object_id), (annotation_id, expression))
            if known != annotation_id:
                message = f"object {object_id} is annotation {known} in {first.name}, but {annotation_id} in"
                row.warnings.append(f"{message} {expression.name}")
            other = videos.setdefault(annotation_id, expression)
            if is_global and other.video != expression.video:
                row.errors.append(f"annotation {annotation_id} belongs to both {expression.name} and {other.name}")
    return row


def check_leaks(expressions: Sequence[Expression], against: Sequence[DatasetConfig]) -> Row:
    """Videos that other splits have too. Folders in front of an id do not count: ReVOS calls a video by its source."""
    if not against:
        return Row(skipped="against=[...]")
    own = {PurePosixPath(expression.video).name: expression.video for expression in expressions}
    row = Row(f"{len(own):,} videos, {', '.join(other.name for other in against)}")
    for other in against:
        videos = {expression.video for expression in read_expressions(other)}
        row.errors += [
            f"video {own[name]} is also in {other.name} ({other.split}), as {video}"
            for video in sorted(videos)
            if (name := PurePosixPath(video).name) in own
        ]
    return row


def check_videos(
    open_checker: Callable[[], VideoChecker], expressions: Sequence[Expression], num_workers: int, progress: Progress
) -> dict[Check, Row]:
    """Every frame and mask, decoded."""
    videos = by_video(expressions)
    total = VideoFindings()
    for done, findings in enumerate(map_in_processes(open_checker, videos, num_workers), 1):
        total.add(findings)
        progress(done, len(videos))
    checker = open_checker()
    no_frames = "" if checker.has_frames else "there is no folder of frames"
    no_masks = no_frames or ("" if checker.has_masks else "there are no masks")
    frames, masks = f"{total.frames:,} frames", f"{total.masks:,} masks"
    rows = {
        Check.frames: Row(f"{len(videos):,} videos, {frames}", no_frames),
        Check.pixels: Row(frames, no_frames),
        Check.sizes: Row(frames, no_frames),
        Check.masks: Row(masks, no_masks),
        Check.codes: Row(masks, no_masks),
        Check.visible: Row(f"{masks}, {total.empty:,} of them empty", no_masks),
        Check.alignment: Row(f"{total.aligned:,} videos", no_masks),
    }
    if not checker.alignment:
        rows[Check.alignment] = Row(skipped="alignment=true")
    for check, message in total.errors:
        rows[check].errors.append(message)
    for check, message in total.warnings:
        rows[check].warnings.append(message)
    return rows


def _why_no_frames(dataset: DatasetConfig) -> str:
    """Empty if there is a folder of frames."""
    folder = image_folder(dataset)
    return "" if folder.is_dir() else f"dataset {dataset.name!r} has no folder of frames; expected {folder}"


def _why_no_masks(dataset: DatasetConfig) -> str:
    """Empty if there are masks; those that lie in one file are opened, as that can fail for all at once."""
    path, masks = mask_path(dataset), open_masks(dataset)
    if not path.exists():
        return f"dataset {dataset.name!r} has no masks; expected {path}"
    try:
        if isinstance(masks, RleMasks | PolygonMasks):
            masks.file.open()
    except ValueError as error:
        return str(error)
    return ""
