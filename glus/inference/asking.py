"""Which prompts a video needs, and how the LLM reads them with as few tokens as the answers need.

All prompts of a video begin with the same opening (system line, context frames), which is read once. Prompts that
begin at the same query frame share that frame and the first words of the question, read once per frame. Prompts that
continue each other are read in one pass. Nothing that is shared changes an answer: tokens see exactly what they would
see in a prompt of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from glus.batch import TokenRows, row_index
from glus.config import FramesConfig, InferenceConfig, Window
from glus.data.chat import Chat
from glus.data.chat.tree import TokenTree, common_prefix, token_rows
from glus.data.sampling import clip_window, query_window
from glus.models.glus import Glus

if TYPE_CHECKING:
    from glus.models.mllm.decoder import Prefix


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
class Prompt:
    """Prompts of one sentence that begin at the same query frame, in one: each shows a beginning of ``frames``."""

    row: int
    frames: tuple[int, ...]
    asked: tuple[int, ...]
    """Turns (numbers from 0, ascending, the last one included) whose frame is to be segmented."""


def merge_prefixes(windows: Iterable[tuple[int, tuple[int, ...]]]) -> list[Prompt]:
    """Group prompts, (row, query frames) each, so that none is read that is the beginning of another."""
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for row, frames in windows:
        groups[row, frames[0]].append(frames)
    prompts = []
    for (row, _), members in groups.items():
        longest: dict[tuple[int, ...], list[int]] = {}
        for frames in sorted(members, key=len, reverse=True):
            whole = next((known for known in longest if known[: len(frames)] == frames), frames)
            longest.setdefault(whole, []).append(len(frames) - 1)
        prompts += [Prompt(row, frames, tuple(sorted(set(asked)))) for frames, asked in longest.items()]
    return prompts


LENGTH_SPREAD = 1.05
"""Longest over shortest prompt of a batch: padding stays below what sharing the first query frame saves."""
HELD_PER_READ = 3
"""Tokens whose keys a batch may hold, those that it continues included, for each that it may read."""


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
        chat: the grammar of the model's conversations, for frames of this video's size.
        texts: the sentences; their numbers are rows.
        context: visual tokens (P, ...) of each context frame.
        device: of the model.
        inference: the prompt's ending, and how many tokens are read at a time.
    """

    def __init__(
        self,
        glus: Glus,
        chat: Chat,
        texts: Sequence[str],
        context: Sequence[torch.Tensor],
        inference: InferenceConfig,
        device: torch.device,
    ):
        self._glus, self._chat, self._texts, self._inference = glus, chat, texts, inference
        self._device = device
        self._token_budget = inference.token_budget or (16384 if self._device.type == "cuda" else 2048)
        self._tokens_per_frame = chat.tokens_per_frame
        self._trees: dict[tuple[int, int, tuple[int, ...]], TokenTree] = {}
        firsts = [self._tree(Prompt(row, (0,), (0,))) for row in range(len(texts))]
        # The token that an answer is read from is not shared, even if two sentences are the same.
        shared = min(common_prefix([first.input_ids for first in firsts]), *(first.reads[0] for first in firsts))
        self._shared = firsts[0].before(shared if len(texts) > 1 else 0)
        opening = chat.opening(len(context))
        self._start, self._num_opening = opening.end, len(opening)
        shown = torch.cat(list(context)) if context else torch.empty((0, *glus.mllm.visual_shape), device=device)
        self._opening = self._prefill([opening], shown, [])

    def ask(self, prompts: Sequence[Prompt], tokens: Mapping[int, torch.Tensor]) -> Answers:
        """Read prompts.

        Args:
            prompts: see ``merge_prefixes``; not empty.
            tokens: frame -> its visual tokens (P, ...) as a query frame.

        Raises:
            ValueError: an answer is not finite.
        """
        slots = {frame: slot for slot, frame in enumerate(dict.fromkeys(f for p in prompts for f in p.frames))}
        visual_TD = torch.cat([tokens[frame] for frame in slots])
        starts = list(dict.fromkeys(prompt.frames[0] for prompt in prompts))
        shared = []
        if len(self._shared):
            trees = [self._shown(self._shared, [slots[frame]]) for frame in starts]
            shared = [self._prefill(trees, visual_TD, [self._opening])]
        places: dict[tuple[int, int], int] = {}
        seg_id = self._chat.vocabulary.seg_id
        embeds, answers = [], []
        for batch in self._batches(prompts):
            rows = row_index([starts.index(prompt.frames[0]) for prompt in batch], self._device)
            past = [self._opening, *(prefix.of_rows(rows) for prefix in shared)]
            states_RD, _ = self._glus.mllm.states(self._rows(batch, slots), visual_TD, past)
            for name in ((prompt.row, prompt.frames[turn]) for prompt in batch for turn in prompt.asked):
                places[name] = len(places)
            embeds_RC, logits_RV = self._glus.answer(states_RD)
            embeds.append(embeds_RC)
            # Of every batch by itself: the logits of all of them, over a large vocabulary, are gigabytes.
            answer = [logits_RV.float().softmax(-1)[:, seg_id], (logits_RV.argmax(-1) == seg_id).float()]
            del logits_RV
            answer.append(embeds_RC.isfinite().all(-1).float())
            iou_logits_R = self._glus.expect_iou(states_RD)
            answer += [] if iou_logits_R is None else [iou_logits_R.sigmoid()]
            answers.append(torch.stack(answer))
        return self._answers(places, torch.cat(embeds), torch.cat(answers, dim=1))

    def _answers(self, places: dict[tuple[int, int], int], embeds_RC: torch.Tensor, answers: torch.Tensor) -> Answers:
        """What all batches answered, in one read-back."""
        scores, has_seg, is_finite, *iou = answers.cpu().numpy()
        is_right = np.isfinite(scores) & (is_finite > 0)
        wrong = sorted((frame, row) for (row, frame), place in places.items() if not is_right[place])
        if wrong:
            frame, row = wrong[0]
            raise not_finite("the LLM's answer", frame, self._texts[row], embeds_RC.dtype)
        return Answers(places, embeds_RC, scores, has_seg > 0, iou[0] if iou else None)

    def _tree(self, prompt: Prompt) -> TokenTree:
        key = prompt.row, len(prompt.frames), prompt.asked
        if key not in self._trees:
            text = self._texts[prompt.row]
            self._trees[key] = self._chat.prompt_tree(text, *key[1:], self._inference.trailing_space)
        return self._trees[key]

    def _prefill(self, trees: Sequence[TokenTree], visual: torch.Tensor, past: Sequence[Prefix]) -> Prefix:
        """Read what prompts begin with, to continue it."""
        rows = token_rows(trees, self._chat.vocabulary.pad_id).to(self._device)
        _, prefix = self._glus.mllm.states(rows, visual, past, keep=True)
        assert prefix is not None
        return prefix

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts of similar length together, padding included at most ``token_budget`` tokens at a time."""
        batch: list[Prompt] = []
        for prompt in sorted(prompts, key=lambda prompt: len(self._tree(prompt))):  # so the newest is the longest
            length = len(self._tree(prompt)) - len(self._shared)
            whole, num_rows = self._num_opening + len(self._tree(prompt)), len(batch) + 1
            # Keys of what a row continues stand in memory for each row; with a single query frame they are most of it.
            is_full = max(length, whole / HELD_PER_READ) * num_rows > self._token_budget
            if batch and (is_full or length > LENGTH_SPREAD * (len(self._tree(batch[0])) - len(self._shared))):
                yield batch
                batch = []
            batch.append(prompt)
        yield batch

    def _rows(self, batch: Sequence[Prompt], slots: Mapping[int, int]) -> TokenRows:
        """The rest of prompts, behind what they share."""
        trees = [self._shown(self._tree(prompt), [slots[frame] for frame in prompt.frames]) for prompt in batch]
        rest = [tree.after(len(self._shared)) for tree in trees]
        return token_rows(rest, self._chat.vocabulary.pad_id).to(self._device)

    def _shown(self, tree: TokenTree, slots: Sequence[int]) -> TokenTree:
        """A tree behind the opening, its frames given as their numbers among those shown."""
        each = np.arange(self._tokens_per_frame)
        visual = (np.array(slots, np.int64)[:, None] * len(each) + each).ravel()
        return replace(tree, positions=tree.positions + self._start, visual=visual[tree.visual])
