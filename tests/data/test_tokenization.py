import numpy as np
import pytest

from glus.data.chat.llava import SYSTEM, LlavaChat, train_vocabulary
from glus.data.chat.tree import common_prefix
from glus.data.sampling import ANSWERS, CONTEXT, QUESTIONS, Turn
from glus.tokens import IMAGE_ID, Vocabulary

SENTENCES = ["the red circle", "The blue square moving left.", "both green triangles", "the 12 largest ones"] * 5
P = 3


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(folder, SENTENCES, 1000)
    return Vocabulary(folder)


@pytest.fixture
def tokenizer(vocabulary):
    return LlavaChat(vocabulary, P)


def pieces(vocabulary, ids):
    """Tokens as words, each image's placeholders as one "<image>"."""
    names = {i: token for token, i in vocabulary.added_tokens.items()} | {IMAGE_ID: "<image>"}
    words = [names.get(int(i)) or vocabulary._pieces.id_to_piece(int(i)) for i in ids]
    text = " ".join(words).replace(" ".join(["<image>"] * P), "<image>")
    return text.split(" ")


def spelled(text):
    return ("▁" + text.replace(" ", "▁")).split(" ")


IMAGE = ["<im_start>", "<image>", "<im_end>"]
OPENING = ["<s>", *spelled(f"{SYSTEM} USER:")]
END = ["[SEG]", "▁.", "</s>"]


def test_a_training_conversation_follows_the_released_grammar(vocabulary, tokenizer):
    turns = [
        Turn(QUESTIONS[2].format(expression="the red circle"), ANSWERS[4]),
        Turn(QUESTIONS[1].format(expression="the red circle"), ANSWERS[2]),
    ]
    conversation = tokenizer.train(turns, num_context=2, name="d/v/0")
    expected = [
        *OPENING, *IMAGE, *IMAGE, *spelled(CONTEXT),
        *IMAGE, "▁What▁is", "▁the", "▁red", "▁circle",
        "▁in▁this▁frame?▁Please▁respond▁with▁segmentation▁mask.▁ASSISTANT:", *END, "▁USER:",
        *IMAGE, "▁Please▁segment▁the", "▁the", "▁red", "▁circle",
        "▁in▁this▁frame.▁ASSISTANT:", "▁Sure,▁it▁is", *END,
    ]  # fmt: skip
    assert pieces(vocabulary, conversation.input_ids) == expected
    assert conversation.input_ids.dtype == conversation.seg_positions.dtype == np.int64
    assert (conversation.input_ids == IMAGE_ID).sum() == 4 * P
    assert (conversation.input_ids[conversation.seg_positions + 1] == vocabulary.seg_id).all()
    assert len(conversation.seg_positions) == 2


def test_an_inference_prompt_ends_where_seg_is_to_come(vocabulary, tokenizer):
    question = ["▁Can▁you▁segment▁the", "▁the", "▁red", "▁circle", "▁in▁this▁frame?▁ASSISTANT:"]
    answer = "▁Sure,▁the▁segmentation▁result▁is"
    expected = [
        *OPENING, *IMAGE, *spelled(CONTEXT),
        *IMAGE, *question, answer, *END, "▁USER:",
        *IMAGE, *question, answer, "▁",
    ]  # fmt: skip
    window = tokenizer.window("The red circle.", num_context=1, num_query=2)
    assert pieces(vocabulary, window.input_ids) == expected
    assert window.seg_positions.tolist() == [len(window.input_ids) - 1]
    bare = tokenizer.window("The red circle.", num_context=1, num_query=2, trailing_space=False)
    np.testing.assert_array_equal(bare.input_ids, window.input_ids[:-1])
    assert bare.seg_positions.tolist() == [len(bare.input_ids) - 1]


def test_a_prompt_without_trailing_space_is_the_beginning_of_a_training_conversation(tokenizer):
    turn = Turn(QUESTIONS[0].format(expression="the red circle"), ANSWERS[3])
    whole = tokenizer.train([turn] * 3, num_context=2, name="d/v/0")
    for n in (1, 2, 3):
        window = tokenizer.window("the red circle", 2, n, trailing_space=False)
        np.testing.assert_array_equal(window.input_ids, whole.input_ids[: len(window.input_ids)])
        assert window.seg_positions[0] == whole.seg_positions[n - 1]


def test_without_context_frames_there_is_no_context_sentence(vocabulary, tokenizer):
    window = tokenizer.window("the red circle", num_context=0, num_query=1)
    assert pieces(vocabulary, window.input_ids)[:5] == [*OPENING, *IMAGE]


def test_a_second_seg_in_a_turn_is_an_error_that_names_the_sample(vocabulary, tokenizer, monkeypatch):
    encode = vocabulary.encode
    monkeypatch.setattr(vocabulary, "encode", lambda text: [vocabulary.seg_id] if text == "." else encode(text))
    with pytest.raises(ValueError, match=r"d/v/0 holds 2 \[SEG\] for 1 query frames"):
        tokenizer.train([Turn("What?", ANSWERS[0])], 0, "d/v/0")


def test_a_sentence_that_spells_seg_adds_none(tokenizer):
    turn = Turn(QUESTIONS[0].format(expression="the [SEG] on the <image>"), ANSWERS[0])
    assert len(tokenizer.train([turn], 1, "d/v/0").seg_positions) == 1


def test_words_of_an_expression_are_cut_alike_in_every_template(vocabulary):
    for text in ("the red circle", "a zebra with 12 dots", "triangles"):
        alone = vocabulary.encode(text)
        for question in QUESTIONS:
            ids = vocabulary.encode(f"{question.format(expression=text)} ASSISTANT: Sure,")
            assert ids[1 : 1 + len(alone)] == alone
            assert len(ids) == len(alone) + 3


def test_the_vocabulary_is_the_same_twice_and_keeps_all_text(vocabulary, tmp_path):
    train_vocabulary(tmp_path, reversed(SENTENCES), 1000)
    name = "tokenizer.model"
    assert (tmp_path / name).read_bytes() == (vocabulary.folder / name).read_bytes()
    for text in ("the red circle", "ein  Zebra: 42 Füße?", f"{SYSTEM} USER:"):
        assert vocabulary._pieces.decode(vocabulary.encode(text)) == text
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, 0)


def test_a_vocabulary_that_cannot_be_trained_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sentence"):
        train_vocabulary(tmp_path, [], 1000)
    with pytest.raises(ValueError, match="cannot train a vocabulary of 20 pieces"):
        train_vocabulary(tmp_path, SENTENCES, 20)


@pytest.mark.parametrize("trailing_space", [True, False])
@pytest.mark.parametrize("asked", [(2,), (0, 2), (0, 1, 2)])
def test_every_read_of_a_tree_sees_the_tokens_of_its_own_prompt(tokenizer, asked, trailing_space):
    """Whoever looks from a read sees the window of that turn, token by token, and nothing else."""
    tree = tokenizer.prompt_tree("The red circle.", 3, asked, trailing_space)
    opening, sees = tokenizer.opening(2), tree.sees()
    assert np.unique(np.concatenate(tree.paths)).tolist() == list(range(len(tree)))
    for turn, read in zip(asked, tree.reads, strict=True):
        seen = np.flatnonzero(sees[read])
        prompt = tokenizer.window("The red circle.", 2, turn + 1, trailing_space).input_ids
        order = seen[np.argsort(tree.positions[seen])]
        assert [*opening.input_ids, *tree.input_ids[order]] == prompt.tolist()
        assert tree.positions[order].tolist() == list(range(len(order)))


@pytest.mark.parametrize("count", [2, 9])
def test_a_tree_goes_on_after_its_beginning(tokenizer, count):
    tree = tokenizer.prompt_tree("the red circle", 2, (0, 1))
    rest = tree.after(count)
    np.testing.assert_array_equal(rest.input_ids, tree.input_ids[count:])
    np.testing.assert_array_equal(rest.positions, tree.positions[count:])
    np.testing.assert_array_equal(rest.input_ids[rest.reads], tree.input_ids[tree.reads])
    np.testing.assert_array_equal(rest.sees(), tree.sees()[count:, count:])
    assert len(rest.visual) == (rest.input_ids == IMAGE_ID).sum()
    assert rest.visual.tolist() == tree.visual[len(tree.visual) - len(rest.visual) :].tolist()


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([[1, 2, 3]]) == 3
