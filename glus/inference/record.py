"""What predicting cost and gave: a record per video, summed up over all processes and restarts of a job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from glus.inference import stream as clock
from glus.types import FrameResult

STAGES = (*clock.STAGES, "write")
"""In the order of the work."""


@dataclass
class VideoRecord:
    """One video, all its expressions."""

    frames: int
    masks: int = 0
    """Pairs of expression and frame."""
    without_seg: int = 0
    """Masks where the model did not answer with [SEG]: empty unless ``force_seg``."""
    empty_masks: int = 0
    elapsed: float = 0.0
    """Seconds from the first frame to the last mask on disk."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage. Decoding and writing have threads of their own, so that the sum may exceed ``elapsed``."""

    def add_seconds(self, stage: str, seconds: float) -> None:
        """More time spent in a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def count(self, result: FrameResult) -> None:
        """Add the masks of a result."""
        self.masks += len(result.rows)
        self.without_seg += int((~result.has_seg_R).sum())
        self.empty_masks += int((~result.masks_RHW.any(axis=(1, 2))).sum())

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self)) + "\n"


@dataclass
class Summary:
    """Of the videos of a job that are done."""

    videos: int
    """Of the job."""
    done: int = 0
    frames: int = 0
    masks: int = 0
    without_seg: int = 0
    empty_masks: int = 0
    elapsed: float = 0.0
    """Summed over processes: two that work for a second each count as two."""
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[str], num_videos: int) -> Summary:
        """Sum up.

        Args:
            records: ``VideoRecord.to_json`` of each video that is done.
            num_videos: of the job.
        """
        total = cls(num_videos, done=len(records), seconds=dict.fromkeys(STAGES, 0.0))
        for record in map(json.loads, records):
            for name in ("frames", "masks", "without_seg", "empty_masks", "elapsed"):
                setattr(total, name, getattr(total, name) + record[name])
            for stage, seconds in record["seconds"].items():
                total.seconds[stage] += seconds
        return total

    def to_json(self) -> str:
        """Indented."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """For people: time per stage, and what came out."""
        frames, elapsed = max(self.frames, 1), max(self.elapsed, 1e-9)
        rows = [*self.seconds.items(), ("elapsed", self.elapsed)]
        lines = [f"{'stage':8} {'seconds':>9} {'ms/frame':>9} {'share':>6}"]
        lines += [
            f"{stage:8} {seconds:9.1f} {1000 * seconds / frames:9.1f} {seconds / elapsed:6.0%}"
            for stage, seconds in rows
        ]
        lines.append(
            f"{self.done} of {self.videos} videos, {self.frames} frames, {self.masks} masks: "
            f"{self.without_seg} without [SEG] ({self.without_seg / max(self.masks, 1):.1%}), "
            f"{self.empty_masks} empty ({self.empty_masks / max(self.masks, 1):.1%})"
        )
        return "\n".join(lines)
