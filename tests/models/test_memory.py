"""Which frames are read, what the bank keeps, and what it forgets."""

from __future__ import annotations

import pytest
import torch

from glus.models.glus import MemoryBank, memory_frames


def _holding(numbers: list[int]) -> torch.Tensor:
    """A number for each row: (N, 2, 3, 3)."""
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 3, 3)


def _memory(frame: int, rows: int) -> torch.Tensor:
    """Row r of frame f holds the number 100 f + r."""
    return _holding([100 * frame + row for row in range(rows)])


def _numbers(bank: MemoryBank, steps: dict[int, int]) -> dict[int, list[int]]:
    """What ``_holding`` was given: the memories of each row, oldest first."""
    numbers: dict[int, list[int]] = {}
    for rows in bank.alike(steps):
        memories = bank.recall({row: steps[row] for row in rows})
        found = [[]] * len(rows) if memories is None else memories[:, :, 0, 0, 0].int().tolist()
        numbers |= zip(rows, found, strict=True)
    return numbers


def _num_bytes(bank: MemoryBank) -> int:
    """Of all memories held."""
    return sum(memory.untyped_storage().nbytes() for steps in bank._steps.values() for memory in steps.values())


def _closed_form(frame: int, num_frames: int, stride: int) -> list[int]:
    """The released loop, from the nearest strided memory to the farthest."""
    wanted = {frame - 1}
    for slot in range(1, num_frames):
        wanted.add(((frame - 2) // stride) * stride - (slot - 1) * stride)
    return sorted(f for f in wanted if 0 <= f < frame)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("num_frames", [1, 2, 4, 7])
def test_memory_frames_follow_the_closed_form(stride: int, num_frames: int) -> None:
    for frame in range(60):
        assert memory_frames(frame, num_frames, stride) == _closed_form(frame, num_frames, stride)


def test_memory_counts_of_the_published_setting() -> None:
    counts = [len(memory_frames(frame, 7, 3)) for frame in range(40)]
    assert counts[:10] == [0, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert counts.index(7) == 17
    assert set(counts[17:]) == {7}
    assert memory_frames(18, 7, 3) == [0, 3, 6, 9, 12, 15, 17]
    assert memory_frames(5, 7, 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 7])
def test_nothing_needed_is_forgotten_and_the_bank_stays_small(stride: int, num_frames: int) -> None:
    bank = MemoryBank(num_frames, stride)
    each = _memory(0, 1).numel() * 4
    for frame in range(500):
        expected = [100 * step for step in memory_frames(frame, num_frames, stride)]
        assert _numbers(bank, {0: frame, 1: frame}) == {0: expected, 1: [number + 1 for number in expected]}
        bank.store({0: frame, 1: frame}, _memory(frame, 2))
        assert _num_bytes(bank) <= 2 * num_frames * each


@pytest.mark.parametrize("starts", [[0] * 10, list(range(10))])
def test_rows_that_fall_silent_or_start_late_hold_no_more_than_they_can_read(starts: list[int]) -> None:
    """7 memories for each, and one more before the frame that it cannot be read in."""
    bank = MemoryBank(num_frames=7, stride=3)
    most = 0
    for frame in range(500):
        steps = {row: frame - start for row, start in enumerate(starts) if frame >= start}
        bank.forget(steps)
        answering = {row: step for row, step in steps.items() if frame < 40 * (row + 1)}
        if answering:
            bank.store(answering, _holding([1000 * row + step for row, step in answering.items()]))
        following = {row: step + 1 for row, step in answering.items()}
        for row, numbers in _numbers(bank, following).items():
            assert [number - 1000 * row for number in numbers] == memory_frames(following[row], 7, 3)
        most = max(most, _num_bytes(bank))
    assert most <= 8 * len(starts) * _memory(0, 1).numel() * 4
    assert _num_bytes(bank) == 0


def test_a_failed_row_leaves_a_gap_for_itself_alone() -> None:
    bank = MemoryBank(num_frames=3, stride=1)
    stored = {0: [0, 1, 2], 1: [0, 2], 2: [2, 0], 3: [1]}
    for frame, rows in stored.items():
        bank.store(dict.fromkeys(rows, frame), _holding([100 * frame + row for row in rows]))
    assert _numbers(bank, {2: 4, 1: 4, 0: 4}) == {0: [100, 200], 1: [301], 2: [102, 202]}


def test_rows_with_equally_many_memories_of_different_frames_go_together() -> None:
    bank = MemoryBank(num_frames=3, stride=1)
    bank.store({0: 0, 1: 0}, _memory(0, 2))
    bank.store({0: 1}, _holding([100]))
    bank.store({1: 2}, _holding([201]))
    assert bank.alike({0: 3, 1: 3}) == [[0, 1]]
    assert _numbers(bank, {0: 3, 1: 3}) == {0: [0, 100], 1: [1, 201]}


def test_rows_that_remember_nothing_come_without_memories() -> None:
    bank = MemoryBank(num_frames=7, stride=1)
    assert bank.alike({0: 0, 1: 0}) == [[0, 1]]
    assert bank.recall({0: 0, 1: 0}) is None
    bank.store({1: 0}, _memory(0, 1))
    assert bank.alike({0: 1, 1: 1}) == [[0], [1]]
    assert _numbers(bank, {0: 1, 1: 1}) == {0: [], 1: [0]}


def test_a_bank_that_is_off_stores_nothing() -> None:
    bank = MemoryBank(num_frames=7, stride=1, enabled=False)
    bank.store({0: 0}, _memory(0, 1))
    assert _num_bytes(bank) == 0
    assert bank.recall({0: 1}) is None


def test_gradients_reach_what_was_stored() -> None:
    bank = MemoryBank(num_frames=7, stride=1)
    source = torch.ones(2, 1, 3, 3, requires_grad=True)
    bank.store({0: 0, 1: 0}, source * 5)
    bank.store({0: 1}, source[:1] * 7)
    bank.store({1: 2}, source[1:] * 13)
    recalled = bank.recall({1: 3, 0: 3})  # a frame of both, and a gap for each
    assert recalled is not None
    (gradient,) = torch.autograd.grad(recalled.sum(), source)
    assert gradient[:, 0, 0, 0].tolist() == [5 + 7, 5 + 13]
