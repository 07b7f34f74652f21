import numpy as np
import torch

from glus.batch import Conversation, TrainSample
from glus.data.chat.tree import separate_rows
from glus.data.dataset import collate
from glus.tokens import IMAGE_ID
from glus.types import ObjectKey

PAD = 9


def sample(video, lengths, height, num_context=2, num_query=3):
    rng = np.random.default_rng(len(video))
    keys = [ObjectKey("d", video, "0", str(q), frozenset({1})) for q in range(num_query)]
    return TrainSample(
        context_pixels=rng.integers(0, 256, (num_context, 4, 4, 3), dtype=np.uint8),
        query_pixels=rng.integers(0, 256, (num_query, 4, 4, 3), dtype=np.uint8),
        query_frames=rng.integers(0, 256, (num_query, height, 7, 3), dtype=np.uint8),
        conversations=[Conversation(np.arange(1, n + 1), np.arange(num_query)) for n in lengths],
        target_masks=[np.full((num_query, height, 7), i % 2, np.uint8) for i in range(len(lengths))],
        object_keys=[keys] * len(lengths),
        names=[f"d/{video}/{i}" for i in range(len(lengths))],
    )


def test_rows_of_expressions_point_at_rows_of_videos():
    first, second = sample("a", [5, 7], height=6), sample("bb", [4], height=8)
    batch = collate([first, second], PAD)
    assert [tuple(video.shape) for video in batch.context_pixels] == [(2, 3, 4, 4)] * 2
    assert [tuple(video.shape) for video in batch.query_pixels] == [(3, 3, 4, 4)] * 2
    torch.testing.assert_close(batch.query_pixels[1][2, 0], torch.from_numpy(second.query_pixels[2, ..., 0]))
    assert [tuple(frames.shape) for frames in batch.query_frames] == [(3, 6, 7, 3), (3, 8, 7, 3)]
    assert batch.video_index.tolist() == [0, 0, 1]
    assert batch.names == ["d/a/0", "d/a/1", "d/bb/0"]
    assert [tuple(mask.shape) for mask in batch.target_masks] == [(3, 6, 7), (3, 6, 7), (3, 8, 7)]
    assert batch.rows.reads_R.shape == (9,)
    assert batch.num_masks == 9
    assert batch.object_keys[2][1] == ObjectKey("d", "bb", "0", "1", frozenset({1}))


def test_a_batch_may_have_no_context_frames():
    batch = collate([sample("a", [5], height=6, num_context=0)], PAD)
    assert [tuple(video.shape) for video in batch.context_pixels] == [(0, 3, 4, 4)]


def test_padded_conversations_keep_their_positions():
    rows = [Conversation(np.array([4, 5]), np.array([1])), Conversation(np.array([IMAGE_ID, 7, 8]), np.array([2]))]
    padded = separate_rows(rows, PAD)
    assert padded.input_ids_BL.tolist() == [[4, 5, PAD], [IMAGE_ID, 7, 8]]
    assert padded.placeholders_M.tolist() == [3]
    assert padded.reads_R.tolist() == [1, 3 + 2]
