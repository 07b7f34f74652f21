"""A video on its way through the model: what is to come, what later frames still need, and nothing else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from glus.batch import row_index, to_device, to_host
from glus.config import FramesConfig, InferenceConfig
from glus.data.chat import Chat
from glus.data.frames import Frame, FrameStream
from glus.inference.asking import Answers, Pass, Prompter, merge_prefixes, not_finite
from glus.models.glus import Glus, MemoryBank, segment_step, upsample_masks
from glus.types import FrameResult, Role

KeepsMask = Callable[[int, int], bool]
"""Whether a pass gives the result of a row (first argument) in a frame (second)."""
GPU_MEMORY_SHARE = 0.25
"""Of a GPU's memory that nothing holds, for sentences that are segmented together; the LLM's batches take another part,
features and memories the rest."""
CPU_MEMORY_BYTES = 2**30
KEPT_FOR_SECOND_PASS = 512
"""Frames whose visual tokens wait for a second pass: 0.3 GB of LLaVA's, 2 GB of Qwen3-VL's; others are seen again."""


STAGES = ("decode", "vision", "llm", "segmenter", "resize")
"""Waiting for frames; visual tokens; prompts; features, masks and memory; masks at the frames' size."""


class StageClock:
    """Adds up the time of stages: of the host on a CPU, of the device's own queue on a GPU.

    On a GPU a stage's work is marked by events in the queue, which are read at the end, so measuring costs no
    synchronisation; waiting for frames is measured on the host.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time until the block is left counts as ``name``; of prediction, one of ``STAGES``."""
        if self.device.type == "cuda" and name != "decode":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def add_to(self, totals: dict[str, float]) -> None:
        """Add the seconds of each stage to ``totals``; on a GPU this waits for it."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        for name, seconds in self._seconds.items():
            totals[name] += seconds
        self._seconds.clear()


class VideoRun:
    """A video on its way through the model: frames to come, visual tokens still to be shown, the LLM's prefixes.

    Args:
        glus: the model, in evaluation mode.
        chat: the grammar of its conversations; for which size of frames, the first one decides.
        frames: numbers of context and query frames.
        inference: windows, strides, sizes.
        stream: the video's frames, in the order of ``schedule``.
        context: the context frames.
        texts: E sentences.
        passes: ways through the video, in the order they are followed.
        clock: measures the stages.
    """

    def __init__(
        self,
        glus: Glus,
        chat: Chat,
        frames: FramesConfig,
        inference: InferenceConfig,
        stream: FrameStream,
        context: Sequence[int],
        texts: Sequence[str],
        passes: Sequence[Pass],
        clock: StageClock,
    ):
        self._glus, self._frames, self._inference = glus, frames, inference
        self._device = clock.device
        self._texts = texts
        self._clock = clock
        self._memory_budget = memory_budget(self._inference.memory_gb, self._device)
        roles = glus.mllm.roles
        self._first, self._waiting = passes[0], waiting_frames(context, passes, roles)
        self._tokens: dict[int, torch.Tensor] = {}
        self._stream = stream
        with self._clock.stage("decode"):  # without context frames, the first one says how large frames are
            first = [self._stream.take(frame) for frame in dict.fromkeys(context) or [passes[0].order[0]]]
        self._held = {frame.index: frame for frame in first if frame.index in passes[0].order}
        self._size = first[0].size
        with torch.inference_mode():
            seen = self._see(first, roles[0]) if context else {}
            self._tokens |= seen if roles[0] is Role.query else {}
            with self._clock.stage("llm"):
                shown = [seen[frame] for frame in context]
                self._prompter = Prompter(glus, chat.sized(self._size), texts, shown, inference, self._device)

    def follow(self, one: Pass, keeps_mask: KeepsMask) -> Iterator[FrameResult]:
        """One pass, a chunk of frames at a time; from a GPU, masks travel while the next frame is segmented."""
        bank = self._glus.memory_bank(self._inference.memory_stride)
        travelling = 1 if self._device.type == "cuda" else 0
        pending: list[_PendingMasks] = []
        for frames, answers in self._chunks(one):
            with torch.inference_mode():
                features = self._encode(frames)
            for number, frame in enumerate(frames):
                with torch.inference_mode():
                    result = self._segment(one, frame, features.frame(number), answers, bank, keeps_mask)
                pending += [result] if result.rows else []  # a key frame itself is the other pass's
                if len(pending) > travelling:
                    yield self._checked(pending.pop(0))
        for last in pending:
            yield self._checked(last)

    def _checked(self, pending: _PendingMasks) -> FrameResult:
        """Wait for a result, and empty the masks of what does not exist; memories stay as the model made them.

        Raises:
            ValueError: a mask is not finite.
        """
        result = pending.result()
        wrong = pending.rows_not_finite()
        if wrong:
            raise self._not_finite("the segmenter's mask", result.frame, wrong[0])
        if self._inference.existence_threshold is not None:
            result.masks_RHW[result.existence_R < self._inference.existence_threshold] = False
        return result

    def _not_finite(self, what: str, frame: int, row: int) -> ValueError:
        return not_finite(what, frame, self._texts[row], self._glus.segmenter.dtype)

    def score(self, one: Pass) -> np.ndarray:
        """See ``VideoPredictor.score_frames``; ``one`` visits all frames for all sentences."""
        columns = []
        for frames, answers in self._chunks(one):
            places_FE = np.array([[answers.places[row, frame.index] for row in one.starts] for frame in frames])
            if answers.iou_R is None:
                scores_FE = answers.scores_R[places_FE] * self._stability(frames, answers.embeds_RC, places_FE)
            else:
                scores_FE = answers.iou_R[places_FE]
            is_drawn_FE = answers.has_seg_R[places_FE] | self._inference.force_seg
            columns.append(np.where(is_drawn_FE, scores_FE, 0))
            wrong = np.argwhere(np.isnan(columns[-1]))
            if len(wrong):
                what = "the segmenter's mask" if answers.iou_R is None else "the IoU head's answer"
                raise self._not_finite(what, frames[wrong[0, 0]].index, list(one.starts)[wrong[0, 1]])
        return np.concatenate(columns).T.astype(np.float32)

    @torch.inference_mode()
    def _stability(self, frames: Sequence[Frame], embeds_RC: torch.Tensor, places_FE: np.ndarray) -> np.ndarray:
        """(F, E): how stable each mask is that a frame gives without memory; 0 if it is empty, NaN if not finite."""
        features, segmenter = self._encode(frames), self._glus.segmenter
        with self._clock.stage("segmenter"):
            prompts_FEC = embeds_RC[to_device(places_FE, self._device)]
            stable = []
            for number, frame in enumerate(frames):
                alone = segmenter.condition(features.frame(number), None)
                for prompts_EC in prompts_FEC[number].split(self._rows_at_a_time(frame)):
                    decoded = segmenter.decode(alone, prompts_EC)
                    logits_EM = decoded.all_logits_N4mm[:, 0].flatten(1)
                    stable_E = decoded.stability_N.masked_fill((logits_EM <= 0).all(1), 0)
                    stable.append(stable_E.masked_fill(~logits_EM.isfinite().all(1), torch.nan))
            return torch.cat(stable).view(len(frames), -1).cpu().numpy()

    def _chunks(self, one: Pass) -> Iterator[tuple[list[Frame], Answers]]:
        """The frames of a pass, some at a time, and the LLM's answers to all that is asked about them."""
        last_shown = self._when_last_shown(one)
        for begin in range(0, len(one.order), self._inference.chunk_frames):
            chunk = one.order[begin : begin + self._inference.chunk_frames]
            with self._clock.stage("decode"):
                frames = [self._held.pop(f) if f in self._held else self._stream.take(f) for f in chunk]
            with torch.inference_mode():
                answers = self._ask(one, frames)
            yield frames, answers
            self._forget_tokens(last_shown, begin + len(chunk))

    def _ask(self, one: Pass, frames: Sequence[Frame]) -> Answers:
        """The LLM's answers for all sentences in a chunk of frames."""
        self._tokens |= self._see([frame for frame in frames if frame.index not in self._tokens], Role.query)
        with self._clock.stage("llm"):
            windows = [window for frame in frames for window in self._windows(one, frame.index)]
            return self._prompter.ask(merge_prefixes(windows), self._tokens)

    def _see(self, frames: Sequence[Frame], role: Role) -> dict[int, torch.Tensor]:
        """Frame -> its visual tokens (P, ...), of new frames, in one batch.

        Raises:
            ValueError: a frame has another size than the first, and is not seen alike.
        """
        if not frames:
            return {}
        mllm = self._glus.mllm
        for frame in frames:
            if mllm.grid(frame.size, role) != mllm.grid(self._size, role):
                raise ValueError(
                    f"frame number {frame.index} is {frame.size[0]}x{frame.size[1]}, but the first that was read is "
                    f"{self._size[0]}x{self._size[1]} (height x width); this model's family needs one size per video"
                )
        with self._clock.stage("vision"):
            shown = np.stack([frame.prepared[role] for frame in frames])
            tokens = mllm.see(to_device(shown, self._device).permute(0, 3, 1, 2))
        return dict(zip((frame.index for frame in frames), tokens.unbind(), strict=True))

    def _encode(self, frames: Sequence[Frame]) -> Any:
        """The segmenter's features of a chunk of frames, in one batch."""
        segmenter = self._glus.segmenter
        with self._clock.stage("segmenter"):
            images = [segmenter.prepare_frames(to_device(frame.pixels_HW3, self._device)[None]) for frame in frames]
            return segmenter.encode_frames(torch.cat(images))

    def _segment(
        self, one: Pass, frame: Frame, features: Any, answers: Answers, bank: MemoryBank, keeps_mask: KeepsMask
    ) -> _PendingMasks:
        """Masks of a frame for every sentence that answered with [SEG]; the others get an empty mask and a gap.

        ``features`` are the frame's own.
        """
        steps, memorize = one.steps(frame.index), frame.index != one.order[-1]
        places = {row: answers.places[row, frame.index] for row in steps}
        has_seg = {row: bool(answers.has_seg_R[place]) for row, place in places.items()}
        rows = [row for row in steps if has_seg[row] or self._inference.force_seg]
        kept = [row for row in steps if keeps_mask(row, frame.index)]
        bank.forget(steps)
        size = frame.size
        masks_RHW = torch.zeros((len(kept), *size), dtype=torch.bool, device=self._device)
        object_scores_R = torch.zeros(len(kept), device=self._device)
        is_finite = [torch.ones(0, dtype=torch.bool, device=self._device)]
        segmenter = self._glus.segmenter
        segmented: list[int] = []
        for group in self._groups(bank, {row: steps[row] for row in rows}, frame):
            with self._clock.stage("segmenter"):
                prompts = answers.embeds_RC[self._index([places[row] for row in group])]
                reached = {row: steps[row] for row in group}
                _, decoded = segment_step(
                    segmenter, bank, reached, features, prompts, memorize, segmenter.multimask_fallback
                )
                segmented += group
                is_finite.append(decoded.logits_Nmm.isfinite().flatten(1).all(1) & decoded.object_logits_N.isfinite())
            shown = [number for number, row in enumerate(group) if row in kept]
            if shown:
                with self._clock.stage("resize"):
                    logits, objects = decoded.logits_Nmm, decoded.object_logits_N
                    if len(shown) < len(group):
                        logits, objects = (values[self._index(shown)] for values in (logits, objects))
                    targets = self._index([kept.index(group[number]) for number in shown])
                    masks_RHW.index_copy_(0, targets, upsample_masks(logits, size) > 0)
                    object_scores_R.index_copy_(0, targets, objects.float().sigmoid())
        scores = np.array([answers.scores_R[places[row]] for row in kept], np.float32)
        seg = np.array([has_seg[row] for row in kept], bool)
        masks, object_scores, finite = map(to_host, (masks_RHW, object_scores_R, torch.cat(is_finite)))
        result = FrameResult(frame.index, tuple(kept), masks.numpy(), scores, seg, object_scores.numpy())
        return _PendingMasks(result, segmented, finite, self._device)

    def _groups(self, bank: MemoryBank, steps: Mapping[int, int], frame: Frame) -> Iterator[list[int]]:
        """Rows that can be segmented together: they have equally many memories, and room."""
        most = self._rows_at_a_time(frame)
        for rows in bank.alike(steps):
            yield from (rows[begin : begin + most] for begin in range(0, len(rows), most))

    def _rows_at_a_time(self, frame: Frame) -> int:
        """Sentences that the segmenter takes together; at least one."""
        each = self._glus.segmenter.step_bytes(self._glus.memory_frames, frame.size)
        return max(1, self._memory_budget // each)

    def _when_last_shown(self, one: Pass) -> dict[int, int]:
        """Frame -> number of the last visit of a pass whose prompts show it, or one behind the pass if it waits."""
        last: dict[int, int] = {}
        for visit, frame in enumerate(one.order):
            for _, window in self._windows(one, frame):
                last |= dict.fromkeys(window, visit)
        return last | dict.fromkeys(self._waiting if one is self._first else (), len(one.order))

    def _windows(self, one: Pass, frame: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Row and query frames of each prompt that asks about a frame."""
        for row, step in one.steps(frame).items():
            yield row, one.window(row, step, self._frames, self._inference.window)

    def _forget_tokens(self, last_shown: Mapping[int, int], num_visits: int) -> None:
        """Drop the tokens that no prompt to come shows."""
        self._tokens = {f: tokens for f, tokens in self._tokens.items() if last_shown.get(f, -1) >= num_visits}

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return row_index(numbers, self._device)


class _PendingMasks:
    """The result of a frame whose arrays may still be on their way from the device.

    Args:
        result: complete once the device has done what it was given to do until now, as is ``is_finite_S``.
        segmented: rows whose mask may not be finite.
        is_finite_S: whether it is.
        device: of the model, maybe not the current one.
    """

    def __init__(self, result: FrameResult, segmented: Sequence[int], is_finite_S: torch.Tensor, device: torch.device):
        self.rows, self._result = result.rows, result
        self._segmented, self._is_finite = segmented, is_finite_S
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def result(self) -> FrameResult:
        """Wait for the masks alone, not for what the device was given to do since."""
        if self._arrived:
            self._arrived.synchronize()
        return self._result

    def rows_not_finite(self) -> list[int]:
        """Segmented rows whose mask is not finite; after ``result``."""
        return [row for row, is_finite in zip(self._segmented, self._is_finite.tolist(), strict=True) if not is_finite]


def memory_budget(memory_gb: float | None, device: torch.device) -> int:
    """Bytes that sentences which are segmented together may fill: ``inference.memory_gb``, or what suits the device."""
    if memory_gb is not None:
        return int(memory_gb * 2**30)
    if device.type != "cuda":
        return CPU_MEMORY_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_MEMORY_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))


def schedule(
    context: Sequence[int], passes: Sequence[Pass], roles: tuple[Role, ...] = (Role.query,)
) -> Iterator[tuple[int, tuple[Role, ...]]]:
    """Frames in the order they are read, and the roles in which the MLLM is to see them.

    Context frames come first and are kept until the first pass reaches them; a second pass reads its frames anew, and
    sees those whose tokens do not wait for it.

    Args:
        context: the context frames.
        passes: ways through the video.
        roles: ``Mllm.roles``.
    """
    yield from ((frame, roles) for frame in dict.fromkeys(context))
    yield from ((frame, (Role.query,)) for frame in passes[0].order if frame not in context)
    waiting = waiting_frames(context, passes, roles)
    for one in passes[1:]:
        yield from ((frame, () if frame in waiting else (Role.query,)) for frame in one.order)


def waiting_frames(context: Sequence[int], passes: Sequence[Pass], roles: tuple[Role, ...]) -> frozenset[int]:
    """Frames that were seen when the first pass is over and whose tokens wait for the second, at most
    ``KEPT_FOR_SECOND_PASS``; see ``schedule``."""
    seen = {*passes[0].order, *(context if len(roles) == 1 else ())}
    return frozenset(
        islice((frame for one in passes[1:] for frame in one.order if frame in seen), KEPT_FOR_SECOND_PASS)
    )
