"""Conversations and prompts of any family, as trees of tokens: what they have in common stands once.

All conversations of a video begin alike: the opening with the context frames, the first query frame, and as much of
the first question as happens to be equal. An LLM that looks back only gives these tokens the same states in each of
them, so a row holds them once, then the rest of each::

    training    [common beginning][rest of 1][rest of 2]...[padding]
    inference   [turns of a prompt][ending of an earlier turn]...

A conversation is a *path* through its row. Where the paths are is all that attention needs (``mllm/decoder.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from glus.batch import Conversation, TokenRows
from glus.data.sampling import Turn, inference_turn
from glus.tokens import IMAGE_ID, AnyVocabulary

LENGTH_MULTIPLE = 64
"""Rows and paths of training are padded to a multiple of it, so that an epoch has few different lengths: kernels and
compiled code that are made for each length are made a few times, and a GPU's tiles are filled."""


def placeholders(input_ids: np.ndarray) -> np.ndarray:
    """Where visual tokens go in token ids of any shape, counted through all of them, row by row: (M,) int64."""
    return np.flatnonzero(input_ids == IMAGE_ID)


@dataclass(frozen=True)
class TokenTree:
    """One row: L tokens, several conversations."""

    input_ids: np.ndarray
    """(L,) int64."""
    positions: np.ndarray
    """(L,) int64: position of each token in its conversation; (L, 3) where a token has three."""
    visual: np.ndarray
    """(M,) int64: which visual token stands at each placeholder."""
    paths: tuple[np.ndarray, ...]
    """The tokens of each conversation, ascending; together they are all tokens."""
    reads: np.ndarray
    """int64: the tokens whose states are wanted."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def end(self) -> int:
        """The position of what follows the last token."""
        return int(self.positions[-1].max()) + 1

    @property
    def is_causal(self) -> bool:
        """Whether every token sees exactly those before it."""
        return len(self.paths) == 1

    def after(self, count: int) -> TokenTree:
        """Without the first ``count`` tokens, which are read before and which every path begins with."""
        paths = tuple(path[path >= count] - count for path in self.paths)
        visual = self.visual[len(placeholders(self.input_ids[:count])) :]
        return TokenTree(self.input_ids[count:], self.positions[count:], visual, paths, self.reads - count)

    def before(self, count: int) -> TokenTree:
        """The first ``count`` tokens, which every path begins with; nothing is read."""
        return single_path(self.input_ids[:count], self.positions[:count])

    def sees(self) -> np.ndarray:
        """(L, L) bool: which tokens each token attends to: along its paths, itself and those before it."""
        sees = np.zeros((len(self), len(self)), bool)
        for path in self.paths:
            sees[np.ix_(path, path)] |= np.tri(len(path), dtype=bool)
        return sees


def single_path(input_ids: np.ndarray, positions: np.ndarray | None = None) -> TokenTree:
    """Tokens of which each sees all before it, with the first visual tokens in their order; nothing is read."""
    tokens, visual = np.arange(len(input_ids)), np.arange(len(placeholders(input_ids)))
    return TokenTree(input_ids, tokens if positions is None else positions, visual, (tokens,), np.empty(0, np.int64))


def shared_tree(conversations: Sequence[Conversation]) -> TokenTree:
    """Conversations about the same frames, their common beginning once; read before each [SEG] of each."""
    shared = common_prefix([c.input_ids for c in conversations])
    rests = [c.input_ids[shared:] for c in conversations]
    ends = shared + np.cumsum([0, *(len(rest) for rest in rests)])
    paths = tuple(np.concatenate([np.arange(shared), np.arange(start, end)]) for start, end in pairwise(ends))
    begun = len(placeholders(conversations[0].input_ids[:shared]))
    return TokenTree(
        np.concatenate([conversations[0].input_ids[:shared], *rests]),
        np.concatenate([conversations[0].positions[:shared], *(c.positions[shared:] for c in conversations)]),
        np.concatenate([np.arange(begun), *(begun + np.arange((rest == IMAGE_ID).sum()) for rest in rests)]),
        paths,
        np.concatenate([path[c.reads] for path, c in zip(paths, conversations, strict=True)]),
    )


class Chat(ABC):
    """Turns of a conversation -> token ids with placeholders for each frame; a family says how parts are written."""

    vocabulary: AnyVocabulary
    """The model's own."""
    tokens_per_frame: int
    """P of a query frame."""
    reads_at_seg: bool
    """See ``Conversation.is_read_at_seg``."""

    def sized(self, size: tuple[int, int]) -> Chat:
        """The grammar for frames of ``size`` (H, W)."""
        return self

    def train(self, turns: Sequence[Turn], num_context: int, name: str) -> Conversation:
        """A whole conversation, one turn per query frame.

        Args:
            turns: Q questions and answers.
            num_context: K.
            name: the sample, for messages.

        Raises:
            ValueError: the conversation does not hold exactly one [SEG] per turn.
        """
        ids = self._opening(num_context)
        for number, turn in enumerate(turns):
            ids += [*(self._user() if number else ()), *self._turn(turn)]
        before = np.flatnonzero(np.array(ids) == self.vocabulary.seg_id) - 1
        if len(before) != len(turns):
            raise ValueError(f"conversation of {name} holds {len(before)} [SEG] for {len(turns)} query frames")
        return self._conversation(ids, before, num_context)

    def window(self, text: str, num_context: int, num_query: int, trailing_space: bool = True) -> Conversation:
        """The prompt of one step at inference; the next token the model predicts is to be [SEG].

        No prompt depends on what the model answered before, so all prompts of a video are known in advance.

        Args:
            text: the expression as written; it is cleaned as the released GLUS does at inference.
            num_context: K.
            num_query: frames of the window, 1..Q; the last one is segmented.
            trailing_space: end in the lone "▁" that the released prompt ends in. It never stands there in training, and
                is LLaVA's own.

        Returns:
            Ids whose last position is the only ``seg_positions`` (the last but one where [SEG] is read itself).
        """
        turn = inference_turn(text)
        earlier = [*self._turn(turn), *self._user()] * (num_query - 1)
        ids = [*self._opening(num_context), *earlier, *self._question(turn, trailing_space)]
        last = np.array([len(ids) - 1], np.int64)
        return self._conversation([*ids, *self._seg_if_read()], last, num_context)

    def opening(self, num_context: int) -> TokenTree:
        """What every prompt of a video begins with, whatever its sentence and query frames."""
        ids = np.array(self._opening(num_context), np.int64)
        return single_path(ids, self._positions(ids, num_context))

    def prompt_tree(self, text: str, num_query: int, asked: Sequence[int], trailing_space: bool = True) -> TokenTree:
        """The windows of the turns ``asked``, which all begin at the same query frame, in one row after ``opening``:
        each is a path. Positions count from the first token after the opening.

        A prompt may end in tokens that the conversation itself does not have at this place: the lone "▁", and [SEG]
        where it is read itself. Such endings stand behind the turns, are seen by nothing but themselves, and see the
        turns up to where they belong.

        Args:
            text: the expression as written.
            num_query: turns; the last one must be asked.
            asked: numbers of turns from 0, ascending.
            trailing_space: see ``window``.
        """
        turn = inference_turn(text)
        whole_turn, question = [*self._turn(turn), *self._user()], self._question(turn)
        prompt = [*self._question(turn, trailing_space), *self._seg_if_read()]
        shared = common_prefix([question, prompt])
        ids, ending = [*whole_turn * (num_query - 1), *question[:shared]], prompt[shared:]
        positions, paths = [self._positions(np.array(ids, np.int64), 0)], []
        length = len(ids)
        for number in asked:
            end = number * len(whole_turn) + shared
            paths.append(np.r_[:end, length : length + len(ending)])
            begin = positions[0][end - 1].max() + 1  # the last token before it is a word
            after = np.arange(begin, begin + len(ending))
            positions.append(after if positions[0].ndim == 1 else np.repeat(after[:, None], 3, axis=1))
            ids, length = ids + ending, length + len(ending)
        array = np.array(ids, np.int64)
        visual = np.arange(len(placeholders(array)))
        reads = np.concatenate([path[-2 if self.reads_at_seg else -1 :] for path in paths])
        # Without endings the paths of earlier turns are beginnings of the last one's.
        return TokenTree(array, np.concatenate(positions), visual, tuple(paths if ending else paths[-1:]), reads)

    @abstractmethod
    def _opening(self, num_context: int) -> list[int]:
        """What stands before the first query frame."""

    @abstractmethod
    def _user(self) -> list[int]:
        """What stands between two turns."""

    @abstractmethod
    def _question(self, turn: Turn, trailing_space: bool = False) -> list[int]:
        """A query frame, its question, and the answer up to [SEG]; of a prompt perhaps with the space of ``window``."""

    @abstractmethod
    def _turn(self, turn: Turn) -> list[int]:
        """The question and the whole answer."""

    def _positions(self, input_ids: np.ndarray, num_context: int) -> np.ndarray:
        """Of tokens whose first ``num_context`` frames are context frames: (L,), or (L, 3) where a token has three."""
        return np.arange(len(input_ids))

    def _seg_if_read(self) -> list[int]:
        return [self.vocabulary.seg_id] * self.reads_at_seg

    def _conversation(self, ids: list[int], before: np.ndarray, num_context: int) -> Conversation:
        array = np.array(ids, np.int64)
        positions = self._positions(array, num_context)
        return Conversation(array, before, positions if positions.ndim == 2 else None, self.reads_at_seg)


def token_rows(trees: Sequence[TokenTree], pad_id: int, multiple: int = 1) -> TokenRows:
    """The trees as rows of equal length, padded on the right; how each token attends is given by a mask if need be.

    Args:
        trees: B of them.
        pad_id: token on padding; nothing looks at it.
        multiple: of which the length is one.
    """
    input_ids = _padded([tree.input_ids for tree in trees], pad_id, multiple)
    visual = np.concatenate([tree.visual for tree in trees])
    where = placeholders(input_ids)
    assert len(where) == len(visual), f"{len(where)} image placeholders but {len(visual)} visual tokens"
    sees = None
    if not all(tree.is_causal for tree in trees):
        sees = np.broadcast_to(np.eye(input_ids.shape[1], dtype=bool), (*input_ids.shape, input_ids.shape[1])).copy()
        for row, tree in zip(sees, trees, strict=True):
            row[: len(tree), : len(tree)] = tree.sees()
    return TokenRows(
        input_ids_BL=torch.from_numpy(input_ids),
        position_ids_BL=torch.from_numpy(_padded([tree.positions for tree in trees], 0, multiple)),
        placeholders_M=torch.from_numpy(where),
        visual_index_M=torch.from_numpy(visual),
        reads_R=torch.from_numpy(np.concatenate([row * input_ids.shape[1] + t.reads for row, t in enumerate(trees)])),
        sees_BLL=None if sees is None else torch.from_numpy(sees),
    )


def separate_rows(conversations: Sequence[Conversation], pad_id: int) -> TokenRows:
    """Each conversation in a row and with visual tokens of its own, in their order; read before each [SEG]."""
    return token_rows(_trees_of([[conversation] for conversation in conversations]), pad_id)


def pack_conversations(videos: Sequence[Sequence[Conversation]], pad_id: int) -> TokenRows:
    """One row per video, whose paths are to be gathered: N Lc^2 / 2 scores where a mask would take B L^2.

    Args:
        videos: the conversations of each of B videos, which show the same frames.
        pad_id: token on padding.
    """
    trees = _trees_of(videos)
    causal = [replace(tree, paths=(np.arange(len(tree)),)) for tree in trees]
    rows = token_rows(causal, pad_id, LENGTH_MULTIPLE)
    length = rows.input_ids_BL.shape[1]
    paths = _padded([number * length + path for number, tree in enumerate(trees) for path in tree.paths], None)
    slots = np.zeros(rows.input_ids_BL.numel(), np.int64)
    slots[paths.ravel()[::-1]] = np.arange(paths.size)[::-1]  # of several slots the first is written last, and counts
    return replace(rows, paths_NC=torch.from_numpy(paths), slots_BL=torch.from_numpy(slots.reshape(-1, length)))


def _trees_of(videos: Sequence[Sequence[Conversation]]) -> list[TokenTree]:
    """A tree for each video; its visual tokens follow those of the videos before it."""
    counts = [len(placeholders(conversations[0].input_ids)) for conversations in videos]
    begins = np.cumsum([0, *counts[:-1]])
    return [replace(tree, visual=tree.visual + n) for tree, n in zip(map(shared_tree, videos), begins, strict=True)]


def unpack_conversations(rows: TokenRows) -> list[Conversation]:
    """The N conversations that were packed, each whole."""
    assert rows.paths_NC is not None
    ids, paths = rows.input_ids_BL.flatten().numpy(), rows.paths_NC.numpy()
    conversations = []
    for path, reads in zip(paths, rows.reads_R.numpy().reshape(len(paths), -1), strict=True):
        own = np.unique(path)  # ascending; padding repeats the last one
        positions = rows.position_ids_BL.flatten(0, 1).numpy()[own]
        axes = positions if positions.ndim == 2 else None
        conversations.append(Conversation(ids[own], np.searchsorted(own, reads), axes))
    return conversations


def common_prefix(sequences: Sequence[Sequence[int] | np.ndarray]) -> int:
    """Length of the longest beginning that all sequences share."""
    length = min(len(sequence) for sequence in sequences)
    heads = np.array([sequence[:length] for sequence in sequences])
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length


def _padded(arrays: Sequence[np.ndarray], fill: int | None, multiple: int = LENGTH_MULTIPLE) -> np.ndarray:
    """(N, L, ...) int64, right-padded with ``fill``, or where that is None with each array's last value."""
    length = -(-max(len(array) for array in arrays) // multiple) * multiple
    rows = np.empty((len(arrays), length, *arrays[0].shape[1:]), np.int64)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = array
        row[len(array) :] = array[-1] if fill is None else fill
    return rows
