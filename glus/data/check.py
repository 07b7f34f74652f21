"""What is wrong with a dataset on disk: its files, its expressions, and every frame and mask, decoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from glus.config import DatasetConfig, Layout
from glus.data.alignment import OUTLINE, find_misfit, gradients, mask_outline
from glus.data.benchmarks.index import (
    by_video,
    count_split,
    expression_path,
    image_folder,
    open_masks,
    read_expressions,
    require_texts,
)
from glus.data.frames import FrameStore, are_ascending, orientation
from glus.data.masks import FOREGROUND, MaskStore, RleMasks, Size, by
from glus.data.parallel import map_in_processes
from glus.data.png_masks import PaletteMasks
from glus.types import Expression, Video


class Check(Enum):
    """What is checked, in the order of the table."""

    files = "files in their places"
    checksums = "SHA-256"
    counts = "published counts"
    sentences = "sentences and ids"
    leaks = "videos in other splits"
    frames = "frames there"
    pixels = "frames decode"
    sizes = "frames of one size"
    masks = "masks there"
    codes = "masks decode, fit frames"
    visible = "objects in sight"
    alignment = "masks on their objects"


@dataclass
class CheckRow:
    """The outcome of one check."""

    examined: str = ""
    """What was looked at, in words: ``1,999 frames``."""
    skipped: str = ""
    """Why nothing was checked; empty if it was."""
    errors: list[str] = field(default_factory=list)
    """What is wrong, one line for each case, naming the place."""
    warnings: list[str] = field(default_factory=list)
    """What is legal but worth knowing."""


@dataclass
class DataReport:
    """The outcome of all checks of a split."""

    dataset: DatasetConfig
    rows: dict[Check, CheckRow]

    @property
    def num_errors(self) -> int:
        """Over all checks."""
        return sum(len(row.errors) for row in self.rows.values())

    @property
    def num_warnings(self) -> int:
        """Over all checks."""
        return sum(len(row.warnings) for row in self.rows.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, with every problem; checks by their names."""
        return {
            "dataset": self.dataset.name,
            "layout": self.dataset.layout.value,
            "split": self.dataset.split,
            "root": self.dataset.root,
            "num_errors": self.num_errors,
            "num_warnings": self.num_warnings,
            "checks": {check.name: asdict(row) for check, row in self.rows.items()},
        }


Progress = Callable[[Iterable["VideoFindings"], int], Iterable["VideoFindings"]]
"""Passes on what is found in each video, and shows how many of all are done."""


def check_dataset(
    dataset: DatasetConfig,
    against: Sequence[DatasetConfig] = (),
    alignment: bool = False,
    num_workers: int = 1,
    progress: Progress = lambda found, num_videos: found,
) -> DataReport:
    """Everything that can be told to be wrong with a split on disk. Nothing of the dataset is changed.

    Args:
        dataset: the split; its ``expected`` counts and ``sha256`` are what it is held against.
        against: splits with which it must not share a video.
        alignment: also test whether masks lie on the objects of their own frames, which reads every frame again.
        num_workers: processes; what is found does not depend on it.
        progress: shows how far it is.

    Raises:
        FileNotFoundError, ValueError: the expression file of a split in ``against`` cannot be read.
        OSError: the masks cannot be packed anywhere (see ``MaskPack``), or a process died.
    """
    rows = {check: CheckRow(skipped="needs the expression file") for check in Check}
    rows[Check.checksums] = _check_checksums(dataset)
    try:
        expressions = read_expressions(dataset)
    except FileNotFoundError as error:
        return DataReport(dataset, rows | {Check.files: CheckRow("expression file", errors=[str(error)])})
    except ValueError as error:
        rows[Check.files] = CheckRow(str(expression_path(dataset)))
        return DataReport(dataset, rows | {Check.sentences: CheckRow("expression file", errors=[str(error)])})
    checker = VideoChecker(alignment)
    rows[Check.files] = _check_files(dataset, expressions, checker)
    rows[Check.counts] = _check_counts(dataset, expressions)
    rows[Check.sentences] = _check_sentences(dataset, expressions)
    rows[Check.leaks] = _check_leaks(expressions, against)
    videos, total = by_video(expressions), VideoFindings()
    for findings in progress(map_in_processes(checker, videos, num_workers), len(videos)):
        total.add(findings)
    no_frames = "" if checker.frames else "there is no folder of frames"
    rows |= total.rows(len(videos), no_frames, no_frames or ("" if checker.masks else "there are no masks"))
    if dataset.layout is Layout.ref_youtube_vos:  # elsewhere an object may have no pixel
        visible = rows[Check.visible]
        visible.errors, visible.warnings = visible.warnings, []
    if not alignment:
        rows[Check.alignment] = CheckRow(skipped="alignment=true")
    return DataReport(dataset, rows)


def _check_files(dataset: DatasetConfig, expressions: Sequence[Expression], checker: VideoChecker) -> CheckRow:
    """Whether frames and masks are there, which the checker of videos is given then."""
    row, folder = CheckRow("expression file, frames, masks"), image_folder(dataset)
    if folder.is_dir():
        checker.frames = FrameStore(dataset)
    else:
        row.errors.append(f"dataset {dataset.name!r} has no folder of frames; expected {folder}")
    if not any(expression.annotation_ids for expression in expressions):
        row.examined = "expression file, frames"
        row.warnings.append(f"{dataset.split} names no objects: it can be predicted, but not scored or trained on")
        return row
    masks = open_masks(dataset)
    try:
        masks.open()
        checker.masks = masks
        if isinstance(masks, PaletteMasks):
            checker.listed = masks.listed_objects()
    except (FileNotFoundError, ValueError) as error:
        row.errors.append(str(error))
    return row


def _check_checksums(dataset: DatasetConfig) -> CheckRow:
    if not dataset.sha256:
        return CheckRow(skipped="none is known")
    row = CheckRow(f"{len(dataset.sha256)} files")
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


def _check_counts(dataset: DatasetConfig, expressions: Sequence[Expression]) -> CheckRow:
    """What the files name, against what is published."""
    found = count_split(expressions)
    published = {name: count for name, count in vars(dataset.expected).items() if count is not None}
    row = CheckRow(
        ", ".join(f"{count:,} {name}" for name, count in found.items()), "" if published else "none are known"
    )
    for name, count in published.items():
        if count != found[name]:
            row.errors.append(f"{found[name]:,} {name} in {expression_path(dataset)}; published are {count:,}")
    return row


def _check_sentences(dataset: DatasetConfig, expressions: Sequence[Expression]) -> CheckRow:
    """Whether every expression has words that can be tokenized, and ids always mean the same."""
    row = CheckRow(f"{len(expressions):,} expressions")
    is_global = isinstance(open_masks(dataset), RleMasks)  # an annotation is one object of one video
    videos: dict[str, Expression] = {}
    annotations: dict[tuple[str, int], tuple[str, Expression]] = {}
    for expression in expressions:
        if not expression.text.strip():
            row.errors.append(f"{expression.name} has no text")
        try:
            require_texts([expression])
        except ValueError as error:
            row.errors.append(str(error))
        for object_id, annotation_id in zip(expression.object_ids, expression.annotation_ids, strict=False):
            known, first = annotations.setdefault((expression.video, object_id), (annotation_id, expression))
            if known != annotation_id:
                message = f"object {object_id} is annotation {known} in {first.name}, but {annotation_id} in"
                row.warnings.append(f"{message} {expression.name}")
            other = videos.setdefault(annotation_id, expression)
            if is_global and other.video != expression.video:
                row.errors.append(f"annotation {annotation_id} belongs to both {expression.name} and {other.name}")
    return row


def _check_leaks(expressions: Sequence[Expression], against: Sequence[DatasetConfig]) -> CheckRow:
    """Videos that other splits have too. Folders in front of an id do not count: ReVOS calls a video by its source."""
    if not against:
        return CheckRow(skipped="against=[...]")
    own = {PurePosixPath(expression.video).name: expression.video for expression in expressions}
    row = CheckRow(f"{len(own):,} videos, {', '.join(other.name for other in against)}")
    for other in against:
        for video in sorted({expression.video for expression in read_expressions(other)}):
            if (name := PurePosixPath(video).name) in own:
                row.errors.append(f"video {own[name]} is also in {other.name} ({other.split}), as {video}")
    return row


# ------------------------------------------------------------------------------------------- frames and masks


@dataclass
class VideoFindings:
    """What was looked at and found in a video, or in several."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of frames, masks (annotation, frame), empty masks, and aligned videos: those whose alignment was tested."""
    errors: list[tuple[Check, str]] = field(default_factory=list)
    warnings: list[tuple[Check, str]] = field(default_factory=list)

    def add(self, other: VideoFindings) -> None:
        """Take in those of another video."""
        self.counts += other.counts
        self.errors += other.errors
        self.warnings += other.warnings

    def rows(self, num_videos: int, no_frames: str, no_masks: str) -> dict[Check, CheckRow]:
        """The outcome of the checks of frames and masks; empty, or why there was nothing to check."""
        frames, masks = f"{self.counts['frames']:,} frames", f"{self.counts['masks']:,} masks"
        rows = {
            Check.frames: CheckRow(f"{num_videos:,} videos, {frames}", no_frames),
            Check.pixels: CheckRow(frames, no_frames),
            Check.sizes: CheckRow(frames, no_frames),
            Check.masks: CheckRow(masks, no_masks),
            Check.codes: CheckRow(masks, no_masks),
            Check.visible: CheckRow(f"{masks}, {self.counts['empty']:,} of them empty", no_masks),
            Check.alignment: CheckRow(f"{self.counts['aligned']:,} videos", no_masks),
        }
        for check, message in self.errors:
            rows[check].errors.append(message)
        for check, message in self.warnings:
            rows[check].warnings.append(message)
        return rows


@dataclass
class VideoChecker:
    """Checks the videos of a split, given all expressions of one; it is sent to worker processes."""

    alignment: bool
    """Whether to test that masks lie on the objects of their own frames."""
    frames: FrameStore | None = None
    masks: MaskStore | None = None
    listed: dict[str, set[int]] = field(default_factory=dict)
    """Objects of each video that no sentence need be about."""

    def __call__(self, video: Video) -> VideoFindings:
        """What was found in a video."""
        findings, first = VideoFindings(), video[0]
        size = _check_frames(self.frames, first, findings) if self.frames else None
        if self.frames and self.masks and size:
            outlines_T = _check_masks(self.masks, video, size, self.alignment, findings)
            if not {Check.masks, Check.codes} & {check for check, _ in findings.errors}:
                named = self.masks.values(video) | self.listed.get(first.video, set())
                for files in self.masks.files(video):
                    _check_mask_files(files, named, _video_name(first), findings)
            if self.alignment and not findings.errors:
                gradients_T = [gradients(self.frames.read(first.video, frame)) for frame in first.frames]
                findings.counts["aligned"] += 1
                if misfit := find_misfit(gradients_T, [np.concatenate(outlines) for outlines in outlines_T]):
                    findings.warnings.append((Check.alignment, f"{_video_name(first)}: {misfit}"))
        return findings


def _check_frames(frames: FrameStore, expression: Expression, findings: VideoFindings) -> Size | None:
    """The size of most frames, if any can be read."""
    sizes: dict[str, Size] = {}
    missing, name, num_turned = [], _video_name(expression), 0
    for frame in expression.frames:
        try:
            height, width = frames.read(expression.video, frame).shape[:2]
            sizes[frame] = height, width
            num_turned += frames.is_turned(expression.video, frame)
        except FileNotFoundError as error:
            missing.append(str(error))
        except ValueError as error:
            findings.errors.append((Check.pixels, str(error)))
    if len(missing) == len(expression.frames):
        missing = [f"{name}: none of its {len(missing)} frames is there; first: {missing[0]}"]
    findings.errors += [(Check.frames, message) for message in missing]
    findings.counts["frames"] += len(sizes)
    if not are_ascending(expression.frames):
        message = f"{name}: the numbers of its frames do not ascend in the expression file, whose order is that of time"
        findings.warnings.append((Check.frames, message))
    if num_turned:
        message = f"{name}: {num_turned} of {len(sizes)} frames have an EXIF orientation"
        findings.warnings.append((Check.pixels, f"{message}; they are read as it turns them, masks as they are stored"))
    if not sizes:
        return None
    usual, count = Counter(sizes.values()).most_common(1)[0]
    others = f"{count} frames of the video are {by(usual)} (height x width)"
    for frame, size in sizes.items():
        if size != usual:
            findings.errors.append((Check.sizes, f"frame {name}/{frame} is {by(size)}, but {others}"))
    return usual


def _check_masks(
    masks: MaskStore, video: Video, size: Size, alignment: bool, findings: VideoFindings
) -> list[list[np.ndarray]]:
    """Read every annotation's masks, each once, for the first expression that names it; outlines by frame."""
    outlines_T: list[list[np.ndarray]] = [[np.empty(0, OUTLINE)] for _ in video[0].frames]
    first: dict[str, Expression] = {}
    for expression in video:
        for annotation_id in expression.annotation_ids:
            first.setdefault(annotation_id, replace(expression, annotation_ids=(annotation_id,)))
    for annotation_id, one in first.items():
        num_errors, is_empty = len(findings.errors), []
        for frame, mask_HW in _readable_masks(masks, one, size, findings):
            is_empty.append(not mask_HW.any())
            if alignment:
                outlines_T[frame].append(mask_outline(mask_HW))
        findings.counts.update(masks=len(is_empty), empty=sum(is_empty))
        if is_empty and all(is_empty) and num_errors == len(findings.errors):
            message = f"{one.name}: object {annotation_id} is in none of the {len(is_empty)} masks of the video"
            findings.warnings.append((Check.visible, message))
    return outlines_T


def _check_mask_files(files: Sequence[Path], named: set[int], video: str, findings: VideoFindings) -> None:
    """Warn where the files are not as a program that keeps numbers would write them.

    Nobody has read those of frames that no sentence is about (GroundMoRe): they may be damaged, or of any size.
    """
    odd: dict[str, list[str]] = {}
    before: np.ndarray | None = None
    for path in files:
        try:
            with Image.open(path) as image:
                background = (image.getpalette() or [0, 0, 0])[:3] if image.mode == "P" else [0, 0, 0]
                values_HW = np.array(image).astype(np.uint8) * (FOREGROUND if image.mode == "1" else 1)
                unnamed = sorted(set(np.flatnonzero(np.bincount(values_HW.ravel())).tolist()) - named)
                if image.format != "PNG":
                    odd.setdefault(f"are no PNG but {image.format}, which may change numbers", []).append(str(path))
                if orientation(image) != 1:
                    odd.setdefault("have an EXIF orientation, which does not turn masks", []).append(str(path))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            odd.setdefault("do not decode, in frames that no sentence is about", []).append(f"{path}: {error}")
            continue
        if unnamed:
            found = ", ".join(map(str, unnamed[:5])) + (", ..." if len(unnamed) > 5 else "")
            what = "hold values that no sentence and no meta.json names (of another program, resized smoothly?)"
            odd.setdefault(what, []).append(f"{path}: {found}")
        if any(background):
            what = "give 0, the background, another colour than black (are its numbers those of the dataset?)"
            odd.setdefault(what, []).append(f"{path}: {tuple(background)}")
        if before is not None and before.shape == values_HW.shape and _is_exchanged(before, values_HW):
            odd.setdefault("have 0 where another number was in the frame before", []).append(str(path))
        before = values_HW
    for what, places in odd.items():
        message = f"{video}: {len(places)} of {len(files)} mask files {what}; the first: {places[0]}"
        findings.warnings.append((Check.codes, message))


def _is_exchanged(before_HW: np.ndarray, after_HW: np.ndarray) -> bool:
    """Whether the pixels of value 0 are mostly those that another value had."""
    is_zero_HW = after_HW == 0
    before_V = np.bincount(before_HW.ravel(), minlength=256)
    both_V = np.bincount(before_HW[is_zero_HW], minlength=256)
    iou_V = both_V / np.maximum(before_V + is_zero_HW.sum() - both_V, 1)
    return bool(iou_V[1:].max() > max(iou_V[0], 0.5))


def _readable_masks(
    masks: MaskStore, one: Expression, size: Size, findings: VideoFindings
) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, (H, W) uint8) of the masks of an expression with one annotation; each other is noted as an error."""
    try:
        frames = np.flatnonzero(masks.annotated(one)).tolist()
    except FileNotFoundError as error:
        findings.errors.append((Check.masks, str(error)))
        return
    if num_unlisted := masks.num_unlisted(one):
        message = f"{one.name}: {num_unlisted} mask files are of frames that the expression file does not list"
        findings.warnings.append((Check.masks, f"{message}; they are neither scored nor trained on"))
    if len(frames) < len(one.frames):
        message = f"{one.name}: {len(one.frames) - len(frames)} of {len(one.frames)} frames have no mask"
        findings.warnings.append((Check.masks, message))
    for frame in frames:
        try:
            (mask_HW,) = masks.read(one, [frame], size)
        except (FileNotFoundError, ValueError) as error:
            message = str(error)
            if isinstance(masks, PaletteMasks):  # one file for all objects of the video
                message = message.replace(one.name, _video_name(one))
            problem = (Check.codes if isinstance(error, ValueError) else Check.masks), message
            if problem not in findings.errors:  # as it is where a whole list of masks is too short
                findings.errors.append(problem)
        else:
            yield frame, mask_HW


def _video_name(expression: Expression) -> str:
    return f"{expression.dataset}/{expression.video}"
