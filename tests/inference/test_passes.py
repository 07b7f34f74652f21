"""Which windows a pass shows, and which prompts are read in one."""

from __future__ import annotations

from glus.config import FramesConfig, Window
from glus.inference.asking import Pass, Prompt, merge_prefixes

FRAMES = FramesConfig(num_context=2, num_query=3)


def windows(one: Pass, window: Window = Window.sliding) -> dict[int, dict[int, tuple[int, ...]]]:
    """Row -> frame -> window."""
    return {
        row: {
            frame: one.window(row, one.steps(frame)[row], FRAMES, window)
            for frame in one.order
            if row in one.steps(frame)
        }
        for row in one.starts
    }


def test_rows_start_at_their_key_frames() -> None:
    up, down = Pass({0: 0, 1: 3}, 5, 1), Pass({0: 2, 1: 3}, 5, -1)
    assert list(up.order) == [0, 1, 2, 3, 4]
    assert up.steps(2) == {0: 2}
    assert up.steps(4) == {0: 4, 1: 1}
    assert list(down.order) == [3, 2, 1, 0]
    assert down.steps(1) == {0: 1, 1: 2}


def test_windows_count_from_the_start_of_the_pass() -> None:
    assert windows(Pass({1: 2}, 6, 1))[1] == {2: (2,), 3: (2, 3), 4: (2, 3, 4), 5: (3, 4, 5)}
    assert windows(Pass({1: 3}, 6, -1))[1] == {3: (3,), 2: (3, 2), 1: (3, 2, 1), 0: (2, 1, 0)}
    clips = windows(Pass({1: 1}, 6, 1), Window.clips)[1]
    assert clips == {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (4,), 5: (4, 5)}


def test_prompts_that_go_on_are_read_with_those_that_they_continue() -> None:
    asked = [(0, (0,)), (0, (0, 1)), (0, (0, 1, 2)), (0, (1, 2, 3)), (1, (0,)), (1, (0, 1))]
    assert set(merge_prefixes(asked)) == {
        Prompt(0, (0, 1, 2), (0, 1, 2)),
        Prompt(0, (1, 2, 3), (2,)),
        Prompt(1, (0, 1), (0, 1)),
    }


def test_prompts_that_part_are_read_apart() -> None:
    assert set(merge_prefixes([(0, (0, 2)), (0, (0, 3, 6)), (0, (0,))])) == {
        Prompt(0, (0, 3, 6), (0, 2)),
        Prompt(0, (0, 2), (1,)),
    }
