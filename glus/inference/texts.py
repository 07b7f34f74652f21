"""Whether a model can read what it is asked, found out before any frame is."""

from __future__ import annotations

from collections.abc import Iterable

from glus.inference.predictor import VideoPredictor


def check_lengths(predictor: VideoPredictor, texts: Iterable[tuple[str, str]]) -> None:
    """Stop at a sentence whose longest prompt does not fit the LLM.

    Args:
        predictor: its LLM's ``max_position_embeddings`` is the limit.
        texts: how messages call each sentence, and the sentence.

    Raises:
        ValueError: a prompt is too long; the message gives its length and the limit in tokens.
    """
    limit = predictor.glus.mllm.max_length
    num_context, num_query = predictor.frames.num_context, predictor.frames.num_query

    def length(text: str) -> int:
        return len(predictor.chat.window(text, num_context, num_query, predictor.inference.trailing_space).input_ids)

    rest = length("")
    for name, text in texts:
        tokens = length(text)
        if tokens > limit:
            raise ValueError(
                f"{name}: a sentence of {len(text)} characters needs a prompt of {tokens} tokens ({tokens - rest} for "
                f"the sentence, which is repeated for each of the {num_query} query frames); this model reads at most "
                f"{limit} (max_position_embeddings of its LLM): shorten the sentence to about "
                f"{max(0, len(text) * (limit - rest) // (tokens - rest))} characters"
            )
