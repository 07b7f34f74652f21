"""From config to objective."""

from __future__ import annotations

from glus.config import LossConfig
from glus.losses.contrastive import ContrastiveQueue
from glus.losses.objective import GlusObjective


def build_objective(config: LossConfig, seg_id: int) -> GlusObjective:
    """The objective of ``config``; the contrastive queue exists only if that loss has a weight.

    Raises:
        ValueError: a weight names no term.
    """
    contrastive = config.contrastive
    queue = None
    if config.weights.get("contrastive", 0) > 0:
        queue = ContrastiveQueue(
            contrastive.queue_size, contrastive.num_negatives, contrastive.datasets, contrastive.exclude_same_objects
        )
    return GlusObjective(config.weights, seg_id, queue, contrastive.temperature, contrastive.min_terms)
