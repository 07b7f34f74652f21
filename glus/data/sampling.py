"""What a conversation shows and says: context frames over the whole video, query frames to be segmented, and words.

All functions are pure; randomness comes only from the ``rng`` they are given. The bins of a video are those of
``linspace(0, T, n + 1)`` cut to whole numbers, as in the released GLUS. The wording is the authors', letter for letter
(also "finished"): a trained model knows no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from glus.config import QuerySampling
from glus.tokens import SEG

CONTEXT = "Please finished the following tasks on the context frames above."
"""Follows the context frames; where there are none, neither is this sentence."""

QUESTIONS = (
    "Can you segment the {expression} in this frame?",
    "Please segment the {expression} in this frame.",
    "What is {expression} in this frame? Please respond with segmentation mask.",
    "What is {expression} in this frame? Please output segmentation mask.",
)
"""Follow the query frame they ask about. Training draws one per turn; inference always asks the first."""

ANSWERS = (
    f"It is {SEG}.",
    f"Sure, {SEG}.",
    f"Sure, it is {SEG}.",
    f"Sure, the segmentation result is {SEG}.",
    f"{SEG}.",
)
"""Training draws one per turn; inference always begins the last but one."""


def context_indices_eval(num_frames: int, num_context: int) -> list[int]:
    """The K context frames of a video at inference: near the middle of K equal bins, fixed for the video.

    Frame j is ``min(edge[j] + ceil(T / K) // 2, edge[j + 1] - 1)`` (released GLUS, there K = 4); a bin that is empty
    because the video has fewer than K frames gives its left edge.

    Returns:
        K indices in 0..T-1, ascending.
    """
    half = math.ceil(num_frames / max(num_context, 1)) // 2
    return [max(left, min(left + half, right - 1)) for left, right in pairwise(_edges(num_frames, num_context))]


def context_indices_train(num_frames: int, num_context: int, rng: np.random.Generator) -> list[int]:
    """One random frame from each of K equal bins of the video; an empty bin (T < K) gives its left edge.

    Returns:
        K indices in 0..T-1, ascending.
    """
    edges = _edges(num_frames, num_context)
    return [int(rng.integers(left, max(right, left + 1))) for left, right in pairwise(edges)]


def query_indices_train(
    num_frames: int, num_query: int, sampling: QuerySampling, rng: np.random.Generator
) -> list[int]:
    """The Q frames that a training conversation asks about, ascending.

    ``consecutive``: neighbours, the start uniform in 0..T-Q. ``uniform``: one random frame from each of Q bins. A
    picture (T = 1) is a video that stands still: its one frame Q times, as it is K times the context.

    Raises:
        ValueError: the video has fewer than Q frames, but more than one.
    """
    if num_frames == 1:
        return [0] * num_query
    if num_frames < num_query:
        raise ValueError(f"a video of {num_frames} frames has no {num_query} query frames")
    if sampling is QuerySampling.uniform:
        return context_indices_train(num_frames, num_query, rng)
    start = int(rng.integers(num_frames - num_query + 1))
    return list(range(start, start + num_query))


def query_window(order: Sequence[int], step: int, num_query: int, sampling: QuerySampling) -> list[int]:
    """The frames that a prompt shows at inference: at most Q, the last of them is the one to segment.

    Args:
        order: frames in the order they are processed (forward, backward, from a key frame).
        step: position in ``order`` of the frame to segment.
        num_query: Q.
        sampling: ``consecutive``: the frames just before in ``order``. ``uniform``: those at distances of
            ``ceil(len(order) / Q)``. Positions before the first are left out.

    Returns:
        Frames in the order they are processed.
    """
    distance = 1 if sampling is QuerySampling.consecutive else math.ceil(len(order) / num_query)
    positions = [step - distance * back for back in range(num_query - 1, -1, -1)]
    return [order[position] for position in positions if position >= 0]


def clip_window(order: Sequence[int], step: int, num_query: int) -> list[int]:
    """The frames that a prompt shows where the video is cut into clips of Q frames, as in training.

    Returns:
        The frames of the clip that ``step`` lies in, up to ``order[step]``.
    """
    return list(order[step // num_query * num_query : step + 1])


def _edges(num_frames: int, num_bins: int) -> list[int]:
    """The ``num_bins + 1`` edges of equal bins of 0..T, of none or more; every left edge is a frame of the video."""
    assert num_frames >= 1, "a video has at least one frame"
    return [int(edge) for edge in np.linspace(0, num_frames, num_bins + 1, dtype=int)]


@dataclass(frozen=True)
class Turn:
    """One query frame's question and its answer, the expression filled in."""

    question: str
    answer: str
    """Contains "[SEG]" once."""

    @property
    def lead(self) -> str:
        """The answer's words before [SEG], without the space between; "" for an answer that starts with it."""
        return self.answer.partition(SEG)[0].rstrip()

    @property
    def tail(self) -> str:
        """The answer's words after [SEG]."""
        return self.answer.partition(SEG)[2].strip()


def clean_expression(text: str, strip: bool) -> str:
    """The expression as the templates take it: without one final full stop, in lower case.

    Args:
        text: as the dataset or a person wrote it.
        strip: also drop white space at both ends; the released GLUS does so in training, not at inference.
    """
    text = text.removesuffix(".")
    return (text.strip() if strip else text).lower()


def draw_turns(text: str, num_turns: int, rng: np.random.Generator) -> list[Turn]:
    """The turns of a training conversation: question and answer drawn independently for each turn."""
    expression = clean_expression(text, strip=True)
    return [
        Turn(
            question=QUESTIONS[rng.integers(len(QUESTIONS))].format(expression=expression),
            answer=ANSWERS[rng.integers(len(ANSWERS))],
        )
        for _ in range(num_turns)
    ]


def inference_turn(text: str) -> Turn:
    """The turn that every query frame gets at inference."""
    return Turn(QUESTIONS[0].format(expression=clean_expression(text, strip=False)), ANSWERS[3])
