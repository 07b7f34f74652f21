"""The contrastive loss with the recorded draws: what it draws from, its terms, and the queue before and after."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from glus.config import ContrastiveConfig
from glus.losses.contrastive import Candidates, ContrastiveQueue
from glus.types import ObjectKey
from tools.parity import gates
from tools.parity.batch import Video
from tools.parity.fixture import Record
from tools.parity.report import Case

RELEASE_DATASETS = ["mevis"]
RELEASE_MIN_TERMS = 2
"""What feeds the release's queue, and fewer terms than it takes (METHOD: its GLUS.py, ``cnt > 1``)."""


def contrastive_config(step: Record) -> ContrastiveConfig:
    """The loss as the release computes it, with the recorded sizes."""
    return ContrastiveConfig(
        queue_size=step.get("queue_size", int),
        temperature=step.get("temperature", float),
        num_negatives=step.get("num_negatives", int),
        min_terms=RELEASE_MIN_TERMS,
        datasets=RELEASE_DATASETS,
    )


def key_name(key: ObjectKey) -> str:
    """How recordings call a [SEG] embedding."""
    return f"{key.dataset}_{key.video}_{key.exp_id}_{key.frame}"


def parse_key(name: str, videos: Sequence[Video]) -> ObjectKey:
    """The key of an entry called ``dataset_video_expression_frame``.

    Objects are known for the videos of the batch alone; an entry of another video can be nobody's positive and needs
    none.

    Raises:
        ValueError: the name has another form, or is of a sentence of the batch's videos whose objects are not recorded.
    """
    for video in videos:
        prefix = f"{video.dataset}_{video.name}_"
        if name.startswith(prefix):
            exp_id, _, frame = name.removeprefix(prefix).partition("_")
            return video.key(exp_id, frame)
    parts = name.split("_")
    if len(parts) < 4:
        raise ValueError(f"queue entry {name!r}: expected dataset_video_expression_frame")
    return ObjectKey(parts[0], "_".join(parts[1:-2]), parts[-2], parts[-1], frozenset())


def fill_queue(queue: ContrastiveQueue, step: Record, embeds: np.ndarray, videos: Sequence[Video]) -> None:
    """Push what the queue held before the step.

    Raises:
        ValueError: names and embeddings are not equally many, or see ``parse_key``.
    """
    names = step.get("queue_before", list)
    if len(names) != len(embeds):
        raise ValueError(f"{step.where}: queue_before names {len(names)} entries, there are {len(embeds)} embeddings")
    queue.push([parse_key(name, videos) for name in names], torch.from_numpy(embeds))


class RecordedDraws:
    """Stands in for the random generator of ``ContrastiveQueue.loss``: gives the recorded draws, anchor by anchor.

    Args:
        draws: of the anchors that have a term, in order.
    """

    def __init__(self, draws: Sequence[Record]):
        self.losses = [draw.get("loss", float) for draw in draws]
        self._positives = deque(draw.get("positive", int) for draw in draws)
        self._negatives = deque(np.array(draw.get("negatives", list)) for draw in draws)

    def choice(self, candidates: np.ndarray, size: int | None = None) -> Any:
        """The next positive, or, where ``size`` is given, the next anchor's negatives."""
        return self._positives.popleft() if size is None else self._negatives.popleft()

    def as_generator(self) -> np.random.Generator:
        """Itself, under the type that losses ask for."""
        return cast("np.random.Generator", self)


def compare_candidates(
    case: Case, queue: ContrastiveQueue, keys: Sequence[ObjectKey], embeds_RC: torch.Tensor, step: Record
) -> RecordedDraws:
    """Rows for what each anchor may draw from, which must contain what it drew.

    Args:
        case: gets the rows.
        queue: as it was before the step; it is not changed.
        keys: of the batch, in order.
        embeds_RC: theirs.
        step: ``step_contrastive.json``.

    Returns:
        The recorded draws.

    Raises:
        ValueError: they cannot be replayed: other anchors have a term than recorded, or draws point out of the queue.
    """
    draws = [Record(draw, f"{step.where}: draw {number}") for number, draw in enumerate(step.get("draws", list))]
    case.equal("anchors", [key_name(key) for key in keys], [draw.get("anchor", str) for draw in draws])
    pushed = copy.deepcopy(queue)
    pushed.push(keys, embeds_RC)
    candidates = pushed.candidates(keys)
    ours, recorded = [c is not None for c in candidates], [draw.optional("loss", float) is not None for draw in draws]
    case.equal("anchors with a term", ours, recorded)
    if ours != recorded:
        raise ValueError("other anchors have a term than recorded; their draws cannot be replayed")
    drawn = [(c, draw) for c, draw in zip(candidates, draws, strict=True) if c is not None]
    _compare_draws(case, drawn, queue.num_negatives, len(pushed.keys))
    return RecordedDraws([draw for _, draw in drawn])


def _compare_draws(
    case: Case, drawn: Sequence[tuple[Candidates, Record]], num_negatives: int, queue_length: int
) -> None:
    positives = [[draw.get("positive", int)] for _, draw in drawn]
    negatives = [draw.get("negatives", list) for _, draw in drawn]
    if any(len(indices) != num_negatives for indices in negatives):
        raise ValueError(f"an anchor drew other than num_negatives={num_negatives} negatives")
    if any(not 0 <= index < queue_length for indices in positives + negatives for index in indices):
        raise ValueError(f"a draw points out of the queue of {queue_length} entries")
    counts = [draw.get("num_positive_candidates", int) for _, draw in drawn]
    case.equal("number of positive candidates", [len(candidates.positive) for candidates, _ in drawn], counts)
    _compare_membership(case, "drawn positives are candidates", positives, [c.positive for c, _ in drawn])
    _compare_membership(case, "drawn negatives are candidates", negatives, [c.negative for c, _ in drawn])


def _compare_membership(
    case: Case, title: str, drawn: Sequence[Sequence[int]], candidates: Sequence[np.ndarray]
) -> None:
    found = [np.isin(indices, allowed) for indices, allowed in zip(drawn, candidates, strict=True)]
    if not found:
        case.absent(title, "no anchor has a term")
        return
    is_candidate = np.concatenate(found)
    case.differing(title, int((~is_candidate).sum()), len(is_candidate))


def compare_queue(case: Case, queue: ContrastiveQueue, step: Record, embeds: np.ndarray) -> None:
    """Names, order and embeddings of the queue after the step.

    Args:
        case: gets the rows.
        queue: the replay's.
        step: ``step_contrastive.json``.
        embeds: recorded.
    """
    case.equal("queue, names in order", [key_name(key) for key in queue.keys], step.get("queue_after", list))
    case.close("queue, embeddings", torch.stack(list(queue.embeds)).numpy(), embeds, gates.SEG_EMBEDDING)
