"""Conversations: the grammar of each family, and the tree of tokens that conversations and prompts share."""

from __future__ import annotations

from glus.data.chat.chatml import ChatmlChat, Grid
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import Chat
from glus.tokens import AnyVocabulary, ChatStyle, JsonVocabulary, Vocabulary
from glus.types import Role


def open_chat(vocabulary: AnyVocabulary, style: ChatStyle, grid: Grid, reads_at_seg: bool = False) -> Chat:
    """The grammar of a model's conversations.

    Args:
        vocabulary: the model's own.
        style: ``Mllm.chat``.
        grid: ``Mllm.grid``.
        reads_at_seg: whether the state at [SEG] is wanted besides the one before it.

    Raises:
        ValueError: the vocabulary is of another kind than the family's.
    """
    if style.grammar == "llava" and isinstance(vocabulary, Vocabulary):
        rows, columns = grid((1, 1), Role.query)
        return LlavaChat(vocabulary, rows * columns, reads_at_seg)
    if style.grammar == "chatml" and isinstance(vocabulary, JsonVocabulary):
        return ChatmlChat(vocabulary, style, grid, reads_at_seg)
    raise ValueError(
        f"model.llm.tokenizer={vocabulary.folder} holds {vocabulary.files[0]}, which is not what conversations in the "
        f"grammar {style.grammar!r} are written with: take the folder that belongs to the model's family"
    )
