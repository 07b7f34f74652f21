"""The data types of expressions and results, which need no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np


@dataclass(frozen=True)
class Expression:
    """One sentence about one video: the unit that is trained on, predicted and scored.

    ``frames`` are the frame names exactly as the dataset spells them, in temporal order.
    ``annotation_ids`` address the masks of the referred objects in the dataset's mask store; empty means that
    nothing in the video fits the sentence. ``group`` is the subset under which a benchmark reports the expression
    (Shapes: the kind; "" where a benchmark has no subsets). ``folder`` is where its prediction lies below a folder of
    predictions, if the benchmark has it elsewhere than in ``<video>/<exp_id>``.
    """

    dataset: str
    video: str
    exp_id: str
    text: str
    frames: tuple[str, ...]
    object_ids: tuple[int, ...]
    annotation_ids: tuple[str, ...]
    group: str = ""
    folder: str = ""

    @property
    def prediction_dir(self) -> str:
        """Folder of its masks as PNGs, relative to a folder of predictions; video ids may contain slashes."""
        return self.folder or f"{self.video}/{self.exp_id}"

    @property
    def prediction_file(self) -> str:
        """File of the run-length codes of its whole video, relative to a folder of predictions."""
        return f"{self.video}.jsonl"

    @property
    def name(self) -> str:
        """``dataset/video/exp_id``: how messages call this expression."""
        return f"{self.dataset}/{self.video}/{self.exp_id}"


def require_utf8(text: str, name: str) -> None:
    """Raise ValueError, which calls it ``name``, where a text holds half a character, as no tokenizer takes it.

    JSON may spell such halves (``"\\ud83d"``), and a command line that is not UTF-8 is read as such.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"{name} is no text that can be written as UTF-8: {text!r} holds {half}") from error


Video = Sequence[Expression]
"""All expressions of one video."""


class Role(Enum):
    """What a frame is shown as, which may decide how large the MLLM sees it."""

    context = "context"
    query = "query"


PrepareFrame = Callable[[np.ndarray, Role], np.ndarray]
"""From a frame, (H, W, 3) uint8, to what the MLLM sees of it in a role: ``Mllm.prepare``."""


@dataclass(frozen=True)
class ObjectKey:
    """What one [SEG] stands for: the key by which the contrastive loss finds positives and negatives."""

    dataset: str
    video: str
    exp_id: str
    frame: str
    object_ids: frozenset[int]


@dataclass(frozen=True)
class FrameResult:
    """The answer to expressions of a video in one frame."""

    frame: int
    """Index of the frame in the video."""
    rows: tuple[int, ...]
    """Which expressions (indices of the texts) are answered here: R of E. All, unless key frames let some of them see
    this frame in another sweep over the video; then another result has the others."""
    masks_RHW: np.ndarray
    """bool, at the frame's own resolution."""
    scores_R: np.ndarray
    """float32 in [0, 1]: probability of [SEG] where it was to be predicted."""
    has_seg_R: np.ndarray
    """bool: whether [SEG] was the most likely token; where not, the mask is empty unless ``force_seg``."""
    object_scores_R: np.ndarray
    """float32 in [0, 1]: how sure the segmenter is that there is an object to be seen; 0 where it was not asked."""

    @property
    def existence_R(self) -> np.ndarray:
        """In [0, 1]: how sure the model is that the sentence describes something that is to be seen in the frame."""
        return self.scores_R * self.object_scores_R
