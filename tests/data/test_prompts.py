import numpy as np
import pytest

from glus.data.sampling import ANSWERS, QUESTIONS, Turn, clean_expression, draw_turns, inference_turn
from glus.tokens import SEG


@pytest.mark.parametrize(
    ("text", "trained", "asked"),
    [
        ("The Red circle.", "the red circle", "the red circle"),
        (" A dog. ", "a dog.", " a dog. "),
        ("wait..", "wait.", "wait."),
        ("a dog .", "a dog", "a dog "),
    ],
)
def test_expressions_are_cleaned_as_in_the_release(text, trained, asked):
    assert clean_expression(text, strip=True) == trained
    assert clean_expression(text, strip=False) == asked


def test_every_answer_holds_one_seg():
    assert all(answer.count(SEG) == 1 for answer in ANSWERS)
    assert [(Turn("", answer).lead, Turn("", answer).tail) for answer in ANSWERS] == [
        ("It is", "."),
        ("Sure,", "."),
        ("Sure, it is", "."),
        ("Sure, the segmentation result is", "."),
        ("", "."),
    ]


def test_turns_draw_question_and_answer_independently():
    turns = draw_turns("A {strange} Dog.", 400, np.random.default_rng(0))
    pairs = {(turn.question, turn.answer) for turn in turns}
    questions = [question.format(expression="a {strange} dog") for question in QUESTIONS]
    assert pairs == {(question, answer) for question in questions for answer in ANSWERS}


def test_inference_always_asks_the_same():
    turn = inference_turn("The dog.")
    assert turn == Turn("Can you segment the the dog in this frame?", "Sure, the segmentation result is [SEG].")
