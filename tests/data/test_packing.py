"""One row per video: what its conversations share stands there once, and nothing is lost."""

from __future__ import annotations

import numpy as np
import torch

from glus.batch import Conversation
from glus.data.chat.tree import (
    LENGTH_MULTIPLE,
    pack_conversations,
    shared_tree,
    token_rows,
    unpack_conversations,
)
from glus.tokens import IMAGE_ID

PAD, SEG, IMG = 9, 7, IMAGE_ID


def conversation(*ids: int) -> Conversation:
    array = np.array(ids)
    return Conversation(array, np.flatnonzero(array == SEG) - 1)


SHORT = conversation(1, IMG, IMG, 2, IMG, SEG, 3)
LONG = conversation(1, IMG, IMG, 4, 5, IMG, SEG, 3)


def test_the_common_beginning_stands_there_once() -> None:
    packed = pack_conversations([[SHORT, LONG], [LONG]], PAD)
    assert packed.input_ids_BL.shape == packed.position_ids_BL.shape == (2, LENGTH_MULTIPLE)
    assert packed.input_ids_BL[0, :12].tolist() == [1, IMG, IMG, 2, IMG, SEG, 3, 4, 5, IMG, SEG, 3]
    assert packed.position_ids_BL[0, :12].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7]
    assert packed.input_ids_BL[1, :8].tolist() == LONG.input_ids.tolist()
    assert packed.position_ids_BL[1, :8].tolist() == list(range(8))
    assert packed.input_ids_BL[0, 12:].unique().tolist() == packed.input_ids_BL[1, 8:].unique().tolist() == [PAD]


def test_each_conversation_knows_its_tokens_and_each_token_one_of_its_places() -> None:
    packed = pack_conversations([[SHORT, LONG], [LONG]], PAD)
    tokens = packed.paths_NC
    assert tokens.shape == (3, LENGTH_MULTIPLE)
    assert tokens[0, :7].tolist() == list(range(7))
    assert tokens[1, :8].tolist() == [0, 1, 2, 7, 8, 9, 10, 11]
    assert tokens[2, :8].tolist() == [LENGTH_MULTIPLE + column for column in range(8)]
    assert [row.unique().tolist() for row in (tokens[0, 7:], tokens[1, 8:])] == [[6], [11]]  # repeats the last one
    for row, length in enumerate((12, 8)):
        places = packed.slots_BL[row, :length]
        assert tokens.flatten()[places].tolist() == [row * LENGTH_MULTIPLE + column for column in range(length)]
        starts = torch.tensor([7, 8, 8])[places // LENGTH_MULTIPLE]
        assert bool((places % LENGTH_MULTIPLE < starts).all())  # never a place of padding


def test_positions_of_seg_follow_their_conversation_into_the_row() -> None:
    packed = pack_conversations([[SHORT, LONG], [LONG]], PAD)
    assert packed.reads_R.tolist() == [4, 9, LENGTH_MULTIPLE + 5]
    assert (packed.input_ids_BL.flatten()[packed.reads_R + 1] == SEG).all()


def test_each_placeholder_names_its_visual_token() -> None:
    packed = pack_conversations([[SHORT, LONG], [LONG]], PAD)
    assert packed.placeholders_M.tolist() == [1, 2, 4, 9, *(LENGTH_MULTIPLE + column for column in (1, 2, 5))]
    assert packed.visual_index_M.tolist() == [0, 1, 2, 2, 3, 4, 5]  # the second video's begin at 3


def test_equal_conversations_are_one() -> None:
    packed = pack_conversations([[SHORT, SHORT]], PAD)
    assert packed.input_ids_BL[:, :7].tolist() == [SHORT.input_ids.tolist()]
    assert packed.input_ids_BL[:, 7:].unique().tolist() == [PAD]
    assert packed.reads_R.tolist() == [4, 4]


def test_conversations_that_share_nothing_stand_side_by_side() -> None:
    other = conversation(2, IMG, IMG, IMG, SEG)
    packed = pack_conversations([[SHORT, other]], PAD)
    assert packed.position_ids_BL[:, :12].tolist() == [[*range(7), *range(5)]]
    assert packed.visual_index_M.tolist() == [0, 1, 2, 0, 1, 2]


def test_conversations_come_out_as_they_went_in() -> None:
    videos = [[SHORT, LONG, SHORT], [LONG], [LONG, LONG]]
    packed = pack_conversations(videos, PAD)
    for found, expected in zip(unpack_conversations(packed), (c for video in videos for c in video), strict=True):
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.seg_positions, expected.seg_positions)


def test_three_expressions_of_full_size_need_far_fewer_tokens() -> None:
    """LLaMA's token counts: 34 to open, 66 a frame, 11 after the context, 20 and 10 of the expression a question."""
    image = [5, *[IMG] * 64, 6]
    opening = [*range(100, 134), *image * 4, *range(200, 211)]

    def full_size(expression: int) -> Conversation:
        turn = [*image, *[expression] * 30, SEG, 20, 2]
        return conversation(*opening, *([*turn, 30, 31, 32] * 3), *turn)

    conversations = [full_size(expression) for expression in (1000, 1001, 1002)]
    assert [len(c.input_ids) for c in conversations] == [714] * 3
    packed = pack_conversations([conversations], PAD)
    length = packed.input_ids_BL.shape[1]
    assert 0 <= length - (309 + 66 + 3 * 339) < LENGTH_MULTIPLE
    assert length % LENGTH_MULTIPLE == packed.paths_NC.shape[1] % LENGTH_MULTIPLE == 0
    assert 3 * 714 / length > 1.5


def test_the_mask_of_a_tree_is_that_of_its_conversations() -> None:
    """A token sees itself and the tokens before it in its own conversations, nothing else."""
    tree = shared_tree([SHORT, LONG])
    sees = tree.sees()
    for path in tree.paths:
        assert np.array_equal(sees[np.ix_(path, path)], np.tri(len(path), dtype=bool))
    assert sees.sum(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]
    rows = token_rows([tree, shared_tree([SHORT])], PAD)
    assert rows.sees_BLL is not None
    assert np.array_equal(rows.sees_BLL[0].numpy(), sees)
    assert np.array_equal(rows.sees_BLL[1, :7, :7].numpy(), np.tri(7, dtype=bool))
    assert rows.sees_BLL[1, 7:].sum(1).tolist() == [1] * 5  # padding sees itself
    assert token_rows([shared_tree([SHORT])], PAD).sees_BLL is None
