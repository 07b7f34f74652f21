"""ChatML as token ids: how Qwen and InternVL write conversations.

Special tokens are put in as ids. What stands between two of them is one text and is tokenised as one, as the family's
own chat template and tokenizer do; a sentence that spells a special token stays text. With IMAGE for the start token, P
placeholders, the end token, and a newline where the family has it::

    opening    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n (IMAGE x K {context sentence}  if K > 0)
    turn       IMAGE {question}<|im_end|>\\n<|im_start|>assistant\\n{answer left of [SEG]}[SEG].<|im_end|>\\n
    training   opening  turn  (<|im_start|>user\\n turn) x (Q - 1)
    inference  opening  (turn <|im_start|>user\\n) x (n - 1)  IMAGE {question}...{answer left of [SEG]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from glus.data.chat.tree import Chat
from glus.data.sampling import ANSWERS, CONTEXT, QUESTIONS, Turn
from glus.tokens import IMAGE_ID, SEG, ChatStyle, JsonVocabulary
from glus.types import Role

Grid = Callable[[tuple[int, int], Role], tuple[int, int]]
"""Rows and columns of visual tokens of a frame of a size (H, W): ``Mllm.grid``."""
START, END = "<|im_start|>", "<|im_end|>"
SYSTEM_LINE = "You are a helpful assistant."
LARGEST = (4096, 4096)
"""Size of a frame that is seen in as many tokens as any."""


@dataclass(frozen=True)
class ChatmlChat(Chat):
    """Turns of a conversation -> token ids with placeholders for each frame, and their positions."""

    vocabulary: JsonVocabulary
    style: ChatStyle
    """The family's special tokens."""
    grid: Grid
    reads_at_seg: bool = False
    """See ``Conversation.is_read_at_seg``."""
    size: tuple[int, int] = LARGEST
    """Height and width of the frames that are shown."""

    @property
    def tokens_per_frame(self) -> int:  # type: ignore[override]
        """See ``Chat``."""
        rows, columns = self.grid(self.size, Role.query)
        return rows * columns

    def sized(self, size: tuple[int, int]) -> ChatmlChat:
        """See ``Chat``."""
        return replace(self, size=size)

    def _opening(self, num_context: int) -> list[int]:
        system = self._text(f"system\n{SYSTEM_LINE}")
        ids = [self._id(START), *system, self._id(END), *self._text("\n"), *self._user()]
        for number in range(num_context):
            is_last = number + 1 == num_context
            ids += self._image(Role.context) + self._text(self.style.after_image + (CONTEXT if is_last else ""))
        return ids

    def _user(self) -> list[int]:
        return [self._id(START), *self._text("user\n")]

    def _question(self, turn: Turn, trailing_space: bool = False) -> list[int]:
        lead = turn.answer.partition(SEG)[0]
        lead = lead.rstrip() if self.vocabulary.strips_before_seg else lead
        asked = self._image(Role.query) + self._text(f"{self.style.after_image}{turn.question}")
        return [*asked, self._id(END), *self._text("\n"), self._id(START), *self._text(f"assistant\n{lead}")]

    def _turn(self, turn: Turn) -> list[int]:
        tail = self._text(turn.answer.partition(SEG)[2])
        return [*self._question(turn), self.vocabulary.seg_id, *tail, self._id(END), *self._text("\n")]

    def _image(self, role: Role) -> list[int]:
        rows, columns = self.grid(self.size, role)
        return [self._id(self.style.image_start), *[IMAGE_ID] * (rows * columns), self._id(self.style.image_end)]

    def _id(self, token: str) -> int:
        return self.vocabulary.id_of(token)

    def _text(self, text: str) -> list[int]:
        return self.vocabulary.encode(text)

    def _positions(self, input_ids: np.ndarray, num_context: int) -> np.ndarray:
        if not self.style.has_axes:
            return super()._positions(input_ids, num_context)
        context, query = (self.grid(self.size, role) for role in Role)
        return axis_positions(input_ids, chain(repeat(context, num_context), repeat(query)))


def axis_positions(input_ids: np.ndarray, grids: Iterable[tuple[int, int]]) -> np.ndarray:
    """Time, row and column of each token, as Qwen-VL counts them: a word has the same number for all three; a frame
    keeps its time, counts its rows and columns from there, and what follows begins behind its longer side.

    Args:
        input_ids: (L,); each frame's placeholders stand together, with other tokens before and after.
        grids: rows and columns of each frame, of as many as there are or more.

    Returns:
        (L, 3) int64.
    """
    positions = np.empty((len(input_ids), 3), np.int64)
    at, following = 0, 0
    frames = iter(grids)
    while at < len(input_ids):
        if input_ids[at] == IMAGE_ID:
            rows, columns = next(frames)
            cells = np.indices((rows, columns)).reshape(2, -1).T
            positions[at : at + rows * columns] = following + np.insert(cells, 0, 0, axis=1)
            at, following = at + rows * columns, following + max(rows, columns)
        else:
            positions[at] = following
            at, following = at + 1, following + 1
    return positions


SPECIAL_TOKENS = ("<|endoftext|>", START, END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
                  "<img>", "</img>", "<IMG_CONTEXT>")  # fmt: skip
"""Of small vocabularies, which do for either family."""
_WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
"""Where Qwen's tokenizers cut text before they merge bytes."""


def train_json_vocabulary(folder: str | Path, sentences: Iterable[str], size: int) -> None:
    """Write the vocabulary of a small model to ``folder``: a ``tokenizer.json`` in Qwen's form, without [SEG].

    Args:
        folder: created if need be.
        sentences: expressions as written; the words of questions and answers are added.
        size: ids at most, special tokens and all 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    words = [*sentences, SYSTEM_LINE, CONTEXT, *QUESTIONS, *(answer.replace(SEG, "") for answer in ANSWERS)]
    words += ["system\n", "user\n", "assistant\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words * 2, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
