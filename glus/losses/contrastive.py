"""Object contrastive loss: [SEG] embeddings of one object agree, whatever sentence asked for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from glus.types import ObjectKey


def object_contrastive_loss(
    anchor_RC: torch.Tensor, positive_RC: torch.Tensor, negative_RGC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE over cosine similarities, per anchor, as a log-sum-exp in float32.

    ``-log(exp(s+/tau) / (exp(s+/tau) + sum_g exp(s-_g/tau)))`` (GLUS paper; released utils/contrastive_loss.py, which
    sums exponentials in bfloat16).

    Args:
        anchor_RC: embeddings with gradient.
        positive_RC: one positive each.
        negative_RGC: G negatives each.
        temperature: tau > 0.

    Returns:
        (R,) float32, >= 0.
    """
    anchor = F.normalize(anchor_RC.float(), dim=-1)
    others = torch.cat([positive_RC[:, None], negative_RGC], dim=1).float()
    logits = (F.normalize(others, dim=-1) @ anchor[..., None])[..., 0] / temperature
    return logits.logsumexp(1) - logits[:, 0]


@dataclass(frozen=True)
class Candidates:
    """Indices into the queue from which an anchor's positive and negatives are drawn."""

    positive: np.ndarray
    negative: np.ndarray


@dataclass(frozen=True)
class QueueEntry:
    """An embedding in the queue."""

    position: tuple[int, int]
    """Number of the first sample of its micro-batch, and its row there: sorts entries as the samples are numbered."""
    key: ObjectKey
    embed: torch.Tensor
    """(C,), detached."""


def merge_entries(queues: Iterable[Iterable[QueueEntry]]) -> list[QueueEntry]:
    """Entries of the queues of several ranks in the global order of samples, each once."""
    merged = {entry.position: entry for entries in queues for entry in entries}
    return [merged[position] for position in sorted(merged)]


class ContrastiveQueue:
    """The last [SEG] embeddings of this rank with the objects they stand for, first in first out.

    A positive of an anchor is an entry of the same video and frame whose expression is another one that names the
    same objects. Negatives are all other entries except those of the anchor's own expression; by default they include
    the same objects at other frames, as released. An expression without objects is never an anchor or a positive.

    Args:
        size: entries kept.
        num_negatives: negatives drawn with replacement per anchor; fewer candidates than that, and it has no term.
        datasets: names of the datasets that feed the queue; None: all.
        exclude_same_objects: take no entry of the same objects of the same video as a negative.
    """

    def __init__(
        self, size: int, num_negatives: int, datasets: Sequence[str] | None = None, exclude_same_objects: bool = False
    ):
        self.num_negatives = num_negatives
        self.datasets = None if datasets is None else frozenset(datasets)
        self.exclude_same_objects = exclude_same_objects
        self.entries: deque[QueueEntry] = deque(maxlen=size)
        """The oldest first."""

    def feeds(self, key: ObjectKey) -> bool:
        """Whether this dataset takes part."""
        return self.datasets is None or key.dataset in self.datasets

    def push(self, keys: Sequence[ObjectKey], embeds_RC: torch.Tensor, first_sample: int = 0) -> None:
        """Append embeddings (detached) in order; the oldest fall out.

        Args:
            keys: R keys.
            embeds_RC: of these.
            first_sample: number of the first sample of the micro-batch that they belong to.
        """
        for row, (key, embed) in enumerate(zip(keys, embeds_RC.detach(), strict=True)):
            if self.feeds(key):
                self.entries.append(QueueEntry((first_sample, row), key, embed))

    def restore(self, entries: Iterable[QueueEntry]) -> None:
        """Hold these entries, of which the first fall out if they are too many, and no other."""
        self.entries = deque(entries, self.entries.maxlen)

    def candidates(self, anchors: Sequence[ObjectKey]) -> list[Candidates | None]:
        """For each anchor the entries to draw from; None where it gets no term."""
        return self._candidates(anchors, [entry.key for entry in self.entries])

    def count_terms(self, micro_batches: Sequence[Sequence[ObjectKey]]) -> int:
        """Terms that the coming micro-batches will give, known from the keys alone; the queue is not changed."""
        keys = deque((entry.key for entry in self.entries), self.entries.maxlen)
        count = 0
        for anchors in micro_batches:
            keys.extend(key for key in anchors if self.feeds(key))
            count += sum(found is not None for found in self._candidates(anchors, list(keys)))
        return count

    def loss(
        self,
        keys: Sequence[ObjectKey],
        embeds_RC: torch.Tensor,
        temperature: float,
        rng: np.random.Generator,
        first_sample: int = 0,
    ) -> torch.Tensor:
        """Push the embeddings, then the loss of each that has positive and negatives: (terms,), maybe empty.

        Args:
            keys: R keys.
            embeds_RC: with gradient.
            temperature: see ``object_contrastive_loss``.
            rng: draws one positive and the negatives of each anchor.
            first_sample: see ``push``.
        """
        self.push(keys, embeds_RC, first_sample)
        anchors, positives, negatives = [], [], []
        for row, candidate in enumerate(self.candidates(keys)):
            if candidate is not None:
                anchors.append(row)
                positives.append(int(rng.choice(candidate.positive)))
                negatives.append(rng.choice(candidate.negative, self.num_negatives))
        if not anchors:
            # Part of the graph nevertheless: under ZeRO-3 the backward passes of all ranks must meet the same modules.
            return embeds_RC[:0].float().sum(1)
        anchor_RC = torch.stack([embeds_RC[row] for row in anchors])
        positive_RC = torch.stack([self.entries[entry].embed for entry in positives])
        where_RG = torch.from_numpy(np.stack(negatives)).to(embeds_RC.device, non_blocking=True)
        every_EC = torch.stack([entry.embed for entry in self.entries])
        return object_contrastive_loss(anchor_RC, positive_RC, every_EC[where_RG], temperature)

    def _candidates(self, anchors: Sequence[ObjectKey], keys: Sequence[ObjectKey]) -> list[Candidates | None]:
        by_expression: dict[tuple, list[int]] = {}
        by_objects: dict[tuple, list[int]] = {}
        for i, key in enumerate(keys):
            by_expression.setdefault((key.dataset, key.video, key.exp_id), []).append(i)
            by_objects.setdefault((key.dataset, key.video, key.object_ids), []).append(i)
        found: list[Candidates | None] = []
        for anchor in anchors:
            own = by_expression.get((anchor.dataset, anchor.video, anchor.exp_id), [])
            same = by_objects.get((anchor.dataset, anchor.video, anchor.object_ids), []) if anchor.object_ids else []
            positive = [i for i in same if keys[i].frame == anchor.frame and keys[i].exp_id != anchor.exp_id]
            is_negative = np.ones(len(keys), dtype=bool)
            is_negative[own] = False
            is_negative[same if self.exclude_same_objects else positive] = False
            negative = np.flatnonzero(is_negative)
            usable = self.feeds(anchor) and positive and len(negative) >= self.num_negatives
            found.append(Candidates(np.asarray(positive), negative) if usable else None)
        return found
