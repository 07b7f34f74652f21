"""Benchmarks, mixtures and the frames a conversation sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from glus.config.loading import at_least, checked


class Layout(Enum):
    """How a benchmark lies on disk."""

    mevis = "mevis"
    mevis_v2 = "mevis_v2"
    """MeViS' files under the names of version 2, where a sentence may fit nothing."""
    ref_youtube_vos = "ref_youtube_vos"
    """The training split: palette masks, each sentence names its object."""
    ref_youtube_vos_valid = "ref_youtube_vos_valid"
    """No objects are named; the masks that were released later lie in one folder per sentence."""
    ref_davis17 = "ref_davis17"
    """What ``tools/convert_davis17.py`` writes."""
    revos = "revos"
    reason_vos = "reason_vos"
    lvvis = "lvvis"
    """LV-VIS as VISA re-packed it in MeViS' formats."""
    long_rvos = "long_rvos"
    refcoco = "refcoco"
    """RefCOCO, RefCOCO+ and RefCOCOg: pictures, each read as a video of one frame."""
    ref_sav = "ref_sav"
    """ReVOS' formats, of which the group is the length of the sentence."""
    groundmore = "groundmore"
    """Questions about an interval of the video; palette masks."""
    reason_seg = "reason_seg"
    """ReasonSeg: pictures, each read as a video of one frame."""


class Protocol(Enum):
    """How a benchmark turns masks into numbers; see ``glus/evaluation/protocols.py``."""

    jf = "jf"
    """J and F: mean over all frames, then over expressions (MeViS, Ref-YouTube-VOS, ReasonVOS, Shapes)."""
    mevis_v2 = "mevis_v2"
    revos = "revos"
    ref_davis17 = "ref_davis17"
    """Both protocols, A and B."""
    long_rvos = "long_rvos"
    ref_sav = "ref_sav"
    images = "images"
    """cIoU and gIoU of pictures."""


class QuerySampling(Enum):
    """Where query frames come from."""

    consecutive = "consecutive"
    uniform = "uniform"


@dataclass
class FramesConfig:
    """Which frames a conversation sees; the model itself reads the counts from its inputs."""

    num_context: int = at_least(0, default=4)
    """K, spread over the whole video; 0 drops the context turn altogether ("local only")."""
    num_query: int = at_least(1, default=4)
    """Q, the frames that are segmented together."""
    query_sampling: QuerySampling = QuerySampling.consecutive
    """``consecutive``: Q neighbouring frames. ``uniform`` ("global only"): in training one random frame from each of
    Q equal parts of the video; at inference frame t with the Q - 1 frames before it at distance ceil(T / Q)."""


@dataclass
class ExpectedCounts:
    """What the authors of a benchmark publish about a split; null where they do not say."""

    videos: int | None = at_least(1, default=None)
    """Videos, or pictures of a set of pictures."""
    expressions: int | None = at_least(1, default=None)
    """Sentences."""
    objects: int | None = at_least(1, default=None)
    """Distinct (video, object) pairs that the expressions name."""
    frames: int | None = at_least(1, default=None)
    """Frames of all videos, each counted once."""


def _is_sha256(digest: str) -> bool:
    return len(digest) == 64 and set(digest.lower()) <= set("0123456789abcdef")


@dataclass
class DatasetConfig:
    """One split of one benchmark."""

    name: str = MISSING
    """How messages, reports and ``ObjectKey`` call it."""
    layout: Layout = MISSING
    """Which reader understands it."""
    root: str = MISSING
    """Folder as officially distributed."""
    split: str = MISSING
    """``train``, ``valid_u``, ``valid``, ..."""
    expressions: str | None = None
    """Expression file below ``root``; null: where the layout has it."""
    images: str | None = None
    """Folder of the videos' frames below ``root``; null: where the layout has it."""
    masks: str | None = None
    """Mask file or folder below ``root``; null: where the layout has it."""
    videos: str | None = None
    """Text file below ``root`` with one video id per line: only these are read; null: all that the split has. Empty
    lines and those that begin with ``#`` do not count."""
    expected: ExpectedCounts = field(default_factory=ExpectedCounts)
    """Published counts, against which ``tools/check_data.py`` holds what it finds."""
    sha256: dict[str, str] = checked(_is_sha256, "64 hexadecimal digits", default=dict)
    """SHA-256 of files below ``root`` (64 hexadecimal digits), where known; ``tools/check_data.py`` compares them."""
    protocol: Protocol = Protocol.jf
    """Which numbers ``scripts/score.py`` reports."""
    official_missing: str | None = None
    """What the benchmark's own script does with a missing prediction, for the report; null: there is no such script."""
    groups: str | None = None
    """Sidecar file below the split folder: {video: {exp_id: group}}; its groups are scored apart (Shapes' kinds)."""
    evidence: str | None = None
    """Sidecar file below the split folder: {video: {exp_id: [frames] or null}} of the sentences that name one of
    several look-alikes, with the frames that show which (Shapes)."""


@dataclass
class MixtureItem:
    """One dataset of the training mixture."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    weight: float = checked(lambda weight: weight > 0, "a positive weight (delete the entry to drop it)", default=1.0)
    """Share of draws, relative to the other datasets' weights."""


@dataclass
class DataConfig:
    """What training draws from."""

    mixture: dict[str, MixtureItem] = field(default_factory=dict)
    expressions_per_video: int = at_least(1, default=3)
    """Sentences drawn without replacement for each drawn video; fewer where a video has fewer."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""


@dataclass
class PathsConfig:
    """Where things lie on this machine: the one group to edit."""

    data: str = "data"
    """Folder that holds the benchmarks."""
    weights: str = "weights"
    """Folder that holds downloaded checkpoints."""
    outputs: str = "outputs"
    """Folder that holds runs."""
