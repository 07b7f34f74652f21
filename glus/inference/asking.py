"""Which prompts a video needs, and how the LLM reads them with as few tokens as the answers need.

All prompts of a video begin with the same opening (system line, context frames), which is read once. Prompts that
begin at the same query frame share that frame and the first words of the question, read once per frame. Prompts that
continue each other are read in one pass. Nothing that is shared changes an answer: tokens see exactly what they would
see in a prompt of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from glus.config import FramesConfig, InferenceConfig, Window
from glus.data.chat.llava import LlavaChat, Trunk, common_prefix
from glus.data.sampling import clip_window, query_window
from glus.inference.stream import to_device
from glus.models.glus import Glus
from glus.models.segmenter.memory import row_index
from glus.tokens import placeholders

if TYPE_CHECKING:
    from glus.models.mllm.cache import Prefix


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


LENGTH_SPREAD = 1.05
"""Longest over shortest prompt of a batch: padding stays below what sharing the first query frame saves."""


@dataclass(frozen=True)
class Answers:
    """What the LLM answered to R prompts."""

    places: dict[tuple[int, int], int]
    """(row, frame to segment) -> index of its answer."""
    embeds_RC: torch.Tensor
    """Prompts for the mask decoder, on the model's device."""
    scores_R: np.ndarray
    """float32 in [0, 1]: probability of [SEG]."""
    has_seg_R: np.ndarray
    """bool: [SEG] is the most likely token."""
    iou_R: np.ndarray | None
    """float32 in [0, 1]: what the model's IoU head expects of the masks; None without a head."""


def not_finite(what: str, frame: int, text: str, dtype: torch.dtype) -> ValueError:
    """The error of a number that is not finite, from which an empty mask would come without a word."""
    return ValueError(
        f"frame number {frame}, sentence {text!r}: {what} is not finite; the weights are damaged or do not fit {dtype} "
        "(another: inference.precision)"
    )


class Prompter:
    """Asks for the sentences of one video.

    Args:
        glus: the model, in evaluation mode.
        tokenizer: the model's.
        texts: the sentences; their numbers are rows.
        context_KPD: visual tokens of the context frames.
        inference: the prompt's ending, and how many tokens are read at a time.
    """

    def __init__(
        self,
        glus: Glus,
        tokenizer: LlavaChat,
        texts: Sequence[str],
        context_KPD: torch.Tensor,
        inference: InferenceConfig,
    ):
        self._glus = glus
        self._tokenizer = tokenizer
        self._texts = texts
        self._inference = inference
        self._device = context_KPD.device
        self._token_budget = inference.token_budget or (16384 if self._device.type == "cuda" else 2048)
        self._trunks: dict[tuple[int, int, tuple[int, ...]], Trunk] = {}
        firsts = [self._trunk(Asking(row, (0,), (0,))) for row in range(len(texts))]
        # The token that an answer is read from is not shared, even if two sentences are the same.
        own = min(int(first.limits[-1]) for first in firsts)
        shared = min(own, common_prefix([first.input_ids for first in firsts])) if len(texts) > 1 else 0
        self._shared_ids = firsts[0].input_ids[:shared]
        opening = tokenizer.opening(len(context_KPD))[None]
        self._start = opening.shape[1]
        embeds = self._spliced(opening, [context_KPD.flatten(0, 1)])
        self._opening = glus.mllm.prefill(embeds, torch.arange(self._start, device=self._device)[None])

    def ask(self, askings: Sequence[Asking], tokens: Mapping[int, torch.Tensor]) -> Answers:
        """Read prompts.

        Args:
            askings: see ``passes.together``; not empty.
            tokens: frame -> its visual tokens (P, D).

        Raises:
            ValueError: an answer is not finite.
        """
        starts = list(dict.fromkeys(asking.frames[0] for asking in askings))
        shared = [self._read_shared(starts, tokens)] if len(self._shared_ids) else []
        places: dict[tuple[int, int], int] = {}
        embeds, logits, iou_logits = [], [], []
        for batch in self._batches(askings):
            rows = row_index([starts.index(asking.frames[0]) for asking in batch], self._device)
            states_RD = self._read(batch, tokens, [self._opening, *(prefix.of_rows(rows) for prefix in shared)])
            for name in ((asking.row, asking.frames[turn]) for asking in batch for turn in asking.asked):
                places[name] = len(places)
            embeds_RC, logits_RV = self._glus.answer(states_RD)
            embeds.append(embeds_RC)
            logits.append(logits_RV)
            if self._glus.iou_head is not None:
                iou_logits.append(self._glus.iou_head(states_RD))
        logits_RV = torch.cat(logits)
        seg_id = self._tokenizer.vocabulary.seg_id
        scores_R = logits_RV.float().softmax(-1)[:, seg_id]
        embeds_RC = torch.cat(embeds)
        answers = [scores_R, (logits_RV.argmax(-1) == seg_id).float(), embeds_RC.isfinite().all(-1).float()]
        answers += [torch.cat(iou_logits).sigmoid()] if iou_logits else []
        scores, has_seg, is_finite, *iou = torch.stack(answers).cpu().numpy()
        self._check_finite(places, np.isfinite(scores) & (is_finite > 0))
        return Answers(places, embeds_RC, scores, has_seg > 0, iou[0] if iou else None)

    def _check_finite(self, places: Mapping[tuple[int, int], int], is_finite_R: np.ndarray) -> None:
        wrong = sorted((frame, row) for (row, frame), place in places.items() if not is_finite_R[place])
        if wrong:
            frame, row = wrong[0]
            raise not_finite("the LLM's answer", frame, self._texts[row], self._glus.seg_head.fc1.weight.dtype)

    def _trunk(self, asking: Asking) -> Trunk:
        key = asking.row, len(asking.frames), asking.asked
        if key not in self._trunks:
            text = self._texts[asking.row]
            self._trunks[key] = self._tokenizer.trunk(text, *key[1:], self._inference.trailing_space)
        return self._trunks[key]

    def _read_shared(self, starts: Sequence[int], tokens: Mapping[int, torch.Tensor]) -> Prefix:
        """The first query frame and the question's first words, once per frame: (starts, shared tokens)."""
        ids = np.broadcast_to(self._shared_ids, (len(starts), len(self._shared_ids)))
        embeds = self._spliced(ids, [tokens[frame] for frame in starts])
        positions = torch.arange(self._start, self._start + ids.shape[1], device=self._device).expand(len(starts), -1)
        return self._glus.mllm.prefill(embeds, positions, [self._opening])

    def _batches(self, askings: Sequence[Asking]) -> Iterator[list[Asking]]:
        """Prompts of similar length together, padding included at most ``token_budget`` tokens at a time."""
        batch: list[Asking] = []
        for asking in sorted(askings, key=lambda asking: len(self._trunk(asking))):  # so the newest is the longest
            length = len(self._trunk(asking)) - len(self._shared_ids)
            is_full = length * (len(batch) + 1) > self._token_budget
            if batch and (is_full or length > LENGTH_SPREAD * (len(self._trunk(batch[0])) - len(self._shared_ids))):
                yield batch
                batch = []
            batch.append(asking)
        yield batch

    def _read(
        self, batch: Sequence[Asking], tokens: Mapping[int, torch.Tensor], prefixes: Sequence[Prefix]
    ) -> torch.Tensor:
        """Final states (R, D) where the answers of a batch are read, asking by asking."""
        shared = len(self._shared_ids)
        trunks = [self._trunk(asking).after(shared) for asking in batch]
        ids = _padded([trunk.input_ids for trunk in trunks], self._tokenizer.vocabulary.pad_id)
        seen = [frame for asking in batch for frame in asking.frames[1 if shared else 0 :]]
        embeds = self._spliced(ids, [tokens[frame] for frame in seen])
        positions = self._tensor(_padded([trunk.positions for trunk in trunks], 0) + self._start)
        sees = None if all(trunk.is_causal for trunk in trunks) else self._sees(trunks)
        states_NLD = self._glus.mllm.continued_states(embeds, positions, prefixes, sees)
        reads = [n * ids.shape[1] + read for n, trunk in enumerate(trunks) for read in trunk.reads.tolist()]
        return states_NLD.flatten(0, 1)[row_index(reads, self._device)]

    def _sees(self, trunks: Sequence[Trunk]) -> torch.Tensor:
        """(N, L, L) bool: what each token sees among those of its row."""
        limits = self._tensor(_padded([trunk.limits for trunk in trunks], 0))
        branches = self._tensor(_padded([trunk.branches for trunk in trunks], -1))
        place = torch.arange(limits.shape[1], device=self._device)
        sees_trunk = (branches == 0)[:, None, :] & (place[None, None, :] <= limits[:, :, None])
        is_same = (branches[:, :, None] == branches[:, None, :]) & (place[None, None, :] <= place[None, :, None])
        return sees_trunk | is_same

    def _spliced(self, ids_NL: np.ndarray, visual: list[torch.Tensor]) -> torch.Tensor:
        """(N, L, D): embeddings with visual tokens at their placeholders, which stand in the order of ``visual``."""
        visual_MD = (
            torch.cat(visual) if visual else self._glus.mllm.projector.weight.new_empty(0, self._glus.mllm.width)
        )
        return self._glus.mllm.splice(self._tensor(ids_NL), self._tensor(placeholders(ids_NL)), visual_MD)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self._device)


def _padded(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """(N, L) int64, right-padded."""
    table = np.full((len(arrays), max(len(array) for array in arrays)), fill, np.int64)
    for row, array in zip(table, arrays, strict=True):
        row[: len(array)] = array
    return table
