"""The checks of one video: every frame and every mask is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from glus.config import DatasetConfig
from glus.data.benchmarks.index import open_masks
from glus.data.check.alignment import Outline, find_misfit, gradients, outline, unite
from glus.data.check.findings import Check
from glus.data.frames import FrameStore
from glus.data.mask_store import by
from glus.data.png_masks import PaletteMasks
from glus.data.rle import Size
from glus.types import Expression


@dataclass
class VideoFindings:
    """What was looked at and found in a video, or in several."""

    frames: int = 0
    masks: int = 0
    """(annotation, frame) pairs that were read."""
    empty: int = 0
    """Those without a pixel."""
    aligned: int = 0
    """Videos whose alignment was tested."""
    errors: list[tuple[Check, str]] = field(default_factory=list)
    warnings: list[tuple[Check, str]] = field(default_factory=list)

    def add(self, other: VideoFindings) -> None:
        """Take in those of another video."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class VideoChecker:
    """Checks the videos of a split, given all expressions of one; it is sent to worker processes closed.

    Args:
        dataset: the split.
        has_frames: whether there is a folder of frames at all.
        has_masks: whether there are masks at all.
        alignment: also test whether masks lie on the objects of their own frames.
    """

    def __init__(self, dataset: DatasetConfig, has_frames: bool, has_masks: bool, alignment: bool):
        self.frames, self.masks = FrameStore(dataset), open_masks(dataset)
        self.has_frames, self.has_masks, self.alignment = has_frames, has_masks, alignment

    def __call__(self, expressions: Sequence[Expression]) -> VideoFindings:
        """What was found in a video."""
        findings = VideoFindings()
        size = self._check_frames(expressions[0], findings) if self.has_frames else None
        if size and self.has_masks:
            outlines_T = self._check_masks(expressions, size, findings)
            if self.alignment and not findings.errors:
                self._check_alignment(expressions[0], outlines_T, findings)
        return findings

    def _check_frames(self, expression: Expression, findings: VideoFindings) -> Size | None:
        """The size of most frames, if any can be read."""
        sizes: dict[str, Size] = {}
        missing = []
        for frame in expression.frames:
            try:
                height, width = self.frames.read(expression.video, frame).shape[:2]
                sizes[frame] = height, width
            except FileNotFoundError as error:
                missing.append(str(error))
            except ValueError as error:
                findings.errors.append((Check.pixels, str(error)))
        if len(missing) == len(expression.frames):
            missing = [f"{_video(expression)}: none of its {len(missing)} frames is there; first: {missing[0]}"]
        findings.errors += [(Check.frames, message) for message in missing]
        findings.frames += len(sizes)
        if not sizes:
            return None
        usual, count = Counter(sizes.values()).most_common(1)[0]
        findings.errors += [
            (
                Check.sizes,
                f"frame {_video(expression)}/{frame} is {by(size)}, but {count} frames of the video are {by(usual)} "
                "(height x width)",
            )
            for frame, size in sizes.items()
            if size != usual
        ]
        return usual

    def _check_masks(self, expressions: Sequence[Expression], size: Size, findings: VideoFindings) -> list[Outline]:
        """Read every annotation's masks, each once, for the first expression that names it; outlines by frame."""
        known: set[str] = set()
        outlines: list[list[Outline]] = [[] for _ in expressions[0].frames]
        for expression in expressions:
            for annotation_id in expression.annotation_ids:
                if annotation_id not in known:
                    known.add(annotation_id)
                    one = replace(expression, annotation_ids=(annotation_id,))
                    self._check_annotation(one, size, outlines, findings)
        return [unite(of_frame) for of_frame in outlines]

    def _check_annotation(
        self, one: Expression, size: Size, outlines: list[list[Outline]], findings: VideoFindings
    ) -> None:
        """Read the masks of an expression that has one annotation."""
        try:
            frames = np.flatnonzero(self.masks.annotated(one)).tolist()
        except FileNotFoundError as error:
            findings.errors.append((Check.masks, str(error)))
            return
        if len(frames) < len(one.frames):
            message = f"{one.name}: {len(one.frames) - len(frames)} of {len(one.frames)} frames have no mask"
            findings.warnings.append((Check.masks, message))
        num_errors, num_empty = len(findings.errors), 0
        for frame in frames:
            mask_HW = self._read_mask(one, frame, size, findings)
            if mask_HW is None:
                continue
            findings.masks += 1
            num_empty += not mask_HW.any()
            if self.alignment:
                outlines[frame].append(outline(mask_HW))
        findings.empty += num_empty
        if frames and num_empty == len(frames) and num_errors == len(findings.errors):
            message = f"{one.name}: object {one.annotation_ids[0]} is in none of the {num_empty} masks of the video"
            is_error = isinstance(self.masks, PaletteMasks)  # elsewhere an object may have no pixel
            (findings.errors if is_error else findings.warnings).append((Check.visible, message))

    def _read_mask(self, one: Expression, frame: int, size: Size, findings: VideoFindings) -> np.ndarray | None:
        """(H, W) uint8; None if it cannot be read, which is noted, once if it is the same for several frames."""
        try:
            return self.masks.read(one, [frame], size)[0]
        except FileNotFoundError as error:
            check, message = Check.masks, str(error)
        except ValueError as error:
            check, message = Check.codes, str(error)
        if isinstance(self.masks, PaletteMasks):  # one file for all objects of the video
            message = message.replace(one.name, _video(one))
        if (check, message) not in findings.errors:
            findings.errors.append((check, message))
        return None

    def _check_alignment(self, expression: Expression, outlines_T: Sequence[Outline], findings: VideoFindings) -> None:
        gradients_T = [gradients(self.frames.read(expression.video, frame)) for frame in expression.frames]
        misfit = find_misfit(gradients_T, outlines_T)
        findings.aligned += 1
        if misfit:
            message = (
                f"{_video(expression)}: {misfit.rule} better than its own: edges along {misfit.num_masks} outlines are "
                f"{100 * misfit.gain:.0f} % stronger there"
            )
            findings.warnings.append((Check.alignment, message))


def _video(expression: Expression) -> str:
    return f"{expression.dataset}/{expression.video}"
