"""In which order a video is segmented, what each prompt shows, and which prompts the LLM can read together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from glus.config import FramesConfig, Window
from glus.data.sampling import clip_window, query_window


@dataclass(frozen=True)
class Pass:
    """One way through a video, up or down, for sentences that may start at different frames."""

    starts: Mapping[int, int]
    """Row (sentence) -> the frame where its pass begins, its key frame; at least one row."""
    num_frames: int
    """Of the video."""
    direction: int
    """1: up to the last frame; -1: down to the first."""

    @property
    def order(self) -> range:
        """All frames, as they are visited."""
        return self._from(min(self.starts.values()) if self.direction > 0 else max(self.starts.values()))

    def _from(self, start: int) -> range:
        return range(start, self.num_frames if self.direction > 0 else -1, self.direction)

    def steps(self, frame: int) -> dict[int, int]:
        """Row -> number of the frame in its own pass, for the rows that have begun; windows and memories count it."""
        steps = {row: (frame - start) * self.direction for row, start in self.starts.items()}
        return {row: step for row, step in steps.items() if step >= 0}

    def window(self, row: int, step: int, frames: FramesConfig, window: Window) -> tuple[int, ...]:
        """The query frames of a prompt, the one to be segmented last."""
        order = self._from(self.starts[row])
        if window is Window.clips:
            return tuple(clip_window(order, step, frames.num_query))
        return tuple(query_window(order, step, frames.num_query, frames.query_sampling))


@dataclass(frozen=True)
class Asking:
    """Prompts of one sentence that begin at the same query frame: each shows a beginning of ``frames``."""

    row: int
    frames: tuple[int, ...]
    asked: tuple[int, ...]
    """Turns (numbers from 0, ascending, the last one included) whose frame is to be segmented."""


def together(windows: Iterable[tuple[int, tuple[int, ...]]]) -> list[Asking]:
    """Group prompts, (row, query frames) each, so that none is read that is the beginning of another."""
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for row, frames in windows:
        groups[row, frames[0]].append(frames)
    askings = []
    for (row, _), members in groups.items():
        trunks: dict[tuple[int, ...], list[int]] = {}
        for frames in sorted(members, key=len, reverse=True):
            trunk = next((known for known in trunks if known[: len(frames)] == frames), frames)
            trunks.setdefault(trunk, []).append(len(frames) - 1)
        askings += [Asking(row, frames, tuple(sorted(set(asked)))) for frames, asked in trunks.items()]
    return askings
