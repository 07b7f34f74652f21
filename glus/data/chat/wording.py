"""All text of a conversation: the system line, the roles, the context sentence, questions and answers.

The wording is the authors', letter for letter (also "finished" and "human"): a trained model knows no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glus.tokens import SEG

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = "USER:"
ASSISTANT = "ASSISTANT:"

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
"""Training draws one per turn."""

INFERENCE_QUESTION = QUESTIONS[0]
INFERENCE_ANSWER = ANSWERS[3]


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
    question = INFERENCE_QUESTION.format(expression=clean_expression(text, strip=False))
    return Turn(question, INFERENCE_ANSWER)
