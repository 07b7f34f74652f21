"""Conversations as token ids, and the vocabulary of small models.

The ids are those that the released GLUS saw in training: its tokenizer cuts the text at added tokens, strips white
space next to "[SEG]", "<im_start>" and "<im_end>" (not next to "</s>"), and gives each piece to SentencePiece by
itself, so that each piece starts with SentencePiece's dummy prefix "▁". Written out, with sp for SentencePiece and
IMAGE for <im_start>, P placeholders, <im_end>::

    opening    <s> sp("{system} USER:") (IMAGE x K  sp("{context sentence}")  if K > 0)
    turn       IMAGE sp("{question} ASSISTANT: {answer left of [SEG]}") [SEG] sp(".") </s>
    training   opening  turn  (sp("USER:") turn) x (Q - 1)
    inference  opening  (turn sp("USER:")) x (n - 1)  IMAGE sp("{question} ASSISTANT: Sure, ... result is ")
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from glus.data.chat.tree import Chat
from glus.data.sampling import ANSWERS, CONTEXT, QUESTIONS, Turn, clean_expression
from glus.tokens import IMAGE_ID, Vocabulary, write_added_tokens

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = "USER:"
ASSISTANT = "ASSISTANT:"


@dataclass(frozen=True)
class LlavaChat(Chat):
    """Turns of a conversation -> token ids in which every image is ``tokens_per_frame`` placeholders."""

    vocabulary: Vocabulary
    tokens_per_frame: int
    """P, the visual tokens of a frame (``Llava.tokens_per_frame``)."""
    reads_at_seg: bool = False
    """See ``Conversation.is_read_at_seg``."""

    def _image(self) -> list[int]:
        return [self.vocabulary.image_start_id, *[IMAGE_ID] * self.tokens_per_frame, self.vocabulary.image_end_id]

    def _opening(self, num_context: int) -> list[int]:
        ids = [self.vocabulary.bos_id, *self.vocabulary.encode(f"{SYSTEM} {USER}")]
        if num_context > 0:
            ids += self._image() * num_context + self.vocabulary.encode(CONTEXT)
        return ids

    def _user(self) -> list[int]:
        return self.vocabulary.encode(USER)

    def _question(self, turn: Turn, trailing_space: bool = False) -> list[int]:
        lead = f" {turn.lead}" if turn.lead else ""
        ending = " " if trailing_space else ""
        return self._image() + self.vocabulary.encode(f"{turn.question} {ASSISTANT}{lead}{ending}")

    def _turn(self, turn: Turn) -> list[int]:
        ids = [*self._question(turn), self.vocabulary.seg_id]
        return [*ids, *self.vocabulary.encode(turn.tail), self.vocabulary.eos_id]


def train_vocabulary(folder: str | Path, sentences: Iterable[str], size: int, whole_templates: bool = True) -> None:
    """Write the vocabulary of a small model to ``folder``: ``tokenizer.model`` and ``added_tokens.json``.

    Settings are LLaMA's (byte-pair encoding with byte fallback, dummy prefix, no normalisation, digits apart), but
    each fixed part of the templates is one piece, so that a small language model spends its tokens on frames and
    expressions. The same sentences give the same file, byte for byte.

    Args:
        folder: created if need be.
        sentences: expressions, cleaned as in training; their frequent words become whole pieces.
        size: SentencePiece ids at most; fewer where the sentences give no more.
        whole_templates: False: the templates are cut into words and punctuation marks, nearly as LLaMA's vocabulary
            cuts them, for conversations as long as those of a full-size model.

    Raises:
        ValueError: no sentence, or ``size`` is too small for bytes, letters and template parts.
    """
    sentences = sorted(clean_expression(sentence, strip=True) for sentence in sentences)
    if not sentences:
        raise ValueError(f"no sentence to train the vocabulary in {folder} on")
    if not whole_templates:
        sentences = sentences + [piece.replace("▁", " ").strip() for piece in template_pieces()] * len(sentences)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=written,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=template_pieces() if whole_templates else [],
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"cannot train a vocabulary of {size} pieces in {folder}: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    write_added_tokens(folder)


def template_pieces() -> list[str]:
    """The fixed parts of all conversations as SentencePiece spells them ("▁" for a space), without repetition.

    Each starts with the space before it and ends with a word, so an expression's words keep their own leading space
    and are cut into pieces in the same way whatever stands around them.
    """
    parts = [f"{SYSTEM} {USER}", CONTEXT, USER]
    for question in QUESTIONS:
        before, _, after = question.partition("{expression}")
        parts += [before.rstrip(), f"{after.lstrip()} {ASSISTANT}"]
    for answer in ANSWERS:
        turn = Turn("", answer)
        parts += [turn.lead, turn.tail]
    return list(dict.fromkeys("▁" + part.replace(" ", "▁") for part in parts if part))
