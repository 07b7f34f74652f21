import numpy as np
import pytest

from glus.config import QuerySampling
from glus.data.sampling import context_indices_eval, context_indices_train, query_indices_train, query_window

CONSECUTIVE, UNIFORM = QuerySampling.consecutive, QuerySampling.uniform


@pytest.mark.parametrize(
    ("num_frames", "num_context", "expected"),
    [
        (10, 4, [1, 3, 6, 8]),  # seen in a run of the released evaluator
        (12, 4, [1, 4, 7, 10]),  # likewise
        (12, 1, [6]),
        (4, 4, [0, 1, 2, 3]),
        (9, 2, [2, 6]),
        (2, 4, [0, 0, 1, 1]),
        (1, 8, [0] * 8),
        (10, 0, []),
    ],
)
def test_context_frames_at_inference(num_frames, num_context, expected):
    assert context_indices_eval(num_frames, num_context) == expected


@pytest.mark.parametrize("num_context", [0, 1, 2, 4, 8])
def test_context_frames_never_leave_the_video_and_follow_the_formula(num_context):
    rng = np.random.default_rng(0)
    for num_frames in range(1, 60):
        evaluation = context_indices_eval(num_frames, num_context)
        training = context_indices_train(num_frames, num_context, rng)
        for indices in (evaluation, training):
            assert len(indices) == num_context
            assert indices == sorted(indices)
            assert all(0 <= index < num_frames for index in indices)
        if num_context and num_frames >= num_context:
            edge = np.linspace(0, num_frames, num_context + 1, dtype=int)
            half = -(-num_frames // num_context) // 2
            assert evaluation == [min(edge[j] + half, edge[j + 1] - 1) for j in range(num_context)]
            assert all(edge[j] <= index < edge[j + 1] for j, index in enumerate(training))


def test_training_context_reaches_every_frame_of_each_bin():
    rng = np.random.default_rng(0)
    seen = {index for _ in range(200) for index in context_indices_train(11, 4, rng)}
    assert seen == set(range(11))


def test_consecutive_query_frames_start_anywhere():
    rng = np.random.default_rng(0)
    drawn = [query_indices_train(7, 4, CONSECUTIVE, rng) for _ in range(100)]
    assert {tuple(indices) for indices in drawn} == {(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)}


def test_uniform_query_frames_come_one_from_each_part():
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, high = query_indices_train(10, 2, UNIFORM, rng)
        assert low < 5 <= high


@pytest.mark.parametrize("sampling", list(QuerySampling))
def test_a_video_too_short_for_its_query_frames_is_an_error(sampling):
    with pytest.raises(ValueError, match=r"3 frames has no 4 query frames"):
        query_indices_train(3, 4, sampling, np.random.default_rng(0))


def test_consecutive_window_is_the_released_one():
    order = range(10)
    assert [query_window(order, step, 4, CONSECUTIVE) for step in (0, 2, 3, 9)] == [
        [0],
        [0, 1, 2],
        [0, 1, 2, 3],
        [6, 7, 8, 9],
    ]


def test_window_follows_the_processing_order():
    assert query_window([5, 4, 3, 2], 2, 2, CONSECUTIVE) == [4, 3]
    assert query_window([5, 4, 3, 2], 0, 1, CONSECUTIVE) == [5]


def test_uniform_window_steps_back_by_a_part_of_the_video():
    order = range(10)  # distance ceil(10 / 4) = 3
    assert query_window(order, 9, 4, UNIFORM) == [0, 3, 6, 9]
    assert query_window(order, 7, 4, UNIFORM) == [1, 4, 7]
    assert query_window(order, 2, 4, UNIFORM) == [2]
    assert query_window(range(3), 2, 8, UNIFORM) == [0, 1, 2]
    assert query_window([9, 8, 7, 6], 3, 2, UNIFORM) == [8, 6]


@pytest.mark.parametrize("sampling", list(QuerySampling))
def test_a_picture_is_every_query_frame(sampling):
    assert query_indices_train(1, 4, sampling, np.random.default_rng(0)) == [0, 0, 0, 0]
