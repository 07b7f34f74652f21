"""The sizes that the LLM meets in an epoch are few: kernels that are planned per size are planned rarely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from glus.batch import Batch, TrainSample
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import unpack_conversations
from glus.data.dataset import collate
from glus.data.sampling import draw_turns
from tools.benchmarks.plain import StandInVocabulary

NUM_BATCHES, NUM_CONTEXT, NUM_QUERY, SENTENCES, FULL_SIZE_TOKENS = 300, 4, 4, 3, 64
MULTIPLE = 64


def _sentence(rng: np.random.Generator) -> str:
    """3 to 16 words, 7 in the middle, of 2 to 9 letters: about as those of MeViS."""
    count = int(np.clip(rng.normal(7, 3), 3, 16))
    return " ".join("".join(rng.choice(list("abcdefghij"), rng.integers(2, 10))) for _ in range(count))


def _sample(tokenizer: LlavaChat, rng: np.random.Generator) -> TrainSample:
    pixels = np.zeros((NUM_QUERY, 1, 1, 3), np.uint8)
    conversations = [
        tokenizer.train(draw_turns(_sentence(rng), NUM_QUERY, rng), NUM_CONTEXT, "") for _ in range(SENTENCES)
    ]
    masks = [np.zeros((NUM_QUERY, 1, 1), np.uint8)] * SENTENCES
    return TrainSample(pixels, pixels, pixels, conversations, masks, [[]] * SENTENCES, [""] * SENTENCES)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Micro-batches of two videos, tokens as at full size."""
    vocabulary: Any = StandInVocabulary()
    tokenizer, rng = LlavaChat(vocabulary, FULL_SIZE_TOKENS), np.random.default_rng(0)

    def drawn() -> Iterator[Batch]:
        for _ in range(NUM_BATCHES):
            yield collate([_sample(tokenizer, rng) for _ in range(2)], vocabulary.pad_id)

    return list(drawn())


def longest_row(batch: Batch) -> int:
    return int((batch.rows.input_ids_BL != StandInVocabulary.pad_id).sum(1).max())


def longest_conversation(batch: Batch) -> int:
    return max(len(conversation.input_ids) for conversation in unpack_conversations(batch.rows))


def test_few_shapes_occur(batches: list[Batch]) -> None:
    """Of rows, which all but attention works on, and of conversations, which attend."""
    assert len({longest_row(batch) for batch in batches}) > 100, "the sentences are too alike"
    rows, conversations = ({getattr(b.rows, name).shape for b in batches} for name in ("input_ids_BL", "paths_NC"))
    assert len(rows) <= 12, rows
    assert len(conversations) <= 6, conversations


def test_lengths_are_multiples_that_kernels_like(batches: list[Batch]) -> None:
    for batch in batches:
        assert batch.rows.input_ids_BL.shape[1] % MULTIPLE == batch.rows.paths_NC.shape[1] % MULTIPLE == 0


def test_padding_is_short(batches: list[Batch]) -> None:
    """Up to the next multiple, for the longest of each batch."""
    for batch in batches:
        assert 0 <= batch.rows.input_ids_BL.shape[1] - longest_row(batch) < MULTIPLE
        assert 0 <= batch.rows.paths_NC.shape[1] - longest_conversation(batch) < MULTIPLE
