"""From configs to batches: the only place of the data layer that takes configs apart, and collation.

A batch is rows of expressions pointing at rows of videos.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from glus.batch import Batch, Conversation, TrainSample
from glus.config import DataConfig, DatasetConfig, FramesConfig
from glus.data.benchmarks.index import read_expressions, require_annotations, trainable
from glus.data.chat.llava import ConversationTokenizer
from glus.data.chat.tree import pack_conversations
from glus.data.dataset import Mixture, RefVOSDataset, SampleSettings
from glus.data.frames import FrameStore
from glus.data.masks import open_masks
from glus.tokens import placeholders


def collate(samples: Sequence[TrainSample], pad_id: int) -> Batch:
    """The samples as one batch; the conversations of each video are packed into one row.

    Args:
        samples: B videos with equal numbers of context and query frames.
        pad_id: token on padding; attention never reaches it.
    """
    rows = [row for row, sample in enumerate(samples) for _ in sample.conversations]
    return Batch(
        context_clip=_channels_first([sample.context_clip for sample in samples]),
        query_clip=_channels_first([sample.query_clip for sample in samples]),
        query_frames=[torch.from_numpy(sample.query_frames) for sample in samples],
        **vars(pack_conversations([sample.conversations for sample in samples], pad_id)),
        video_index=torch.tensor(rows, dtype=torch.int64),
        target_masks=[torch.from_numpy(mask) for sample in samples for mask in sample.target_masks],
        object_keys=[keys for sample in samples for keys in sample.object_keys],
        names=[name for sample in samples for name in sample.names],
    )


def pad_conversations(
    conversations: Sequence[Conversation], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Conversations as rows of equal length, padded on the right.

    Args:
        conversations: N of them, each with equally many [SEG].
        pad_id: token on padding; attention never reaches it.

    Returns:
        (N, L) int64 ids, (M,) int64 placeholders counted through the rows, and (N, Q) int64 positions before each
        [SEG].
    """
    longest = max(len(conversation.input_ids) for conversation in conversations)
    input_ids = np.full((len(conversations), longest), pad_id, np.int64)
    for row, conversation in zip(input_ids, conversations, strict=True):
        row[: len(conversation.input_ids)] = conversation.input_ids
    seg_positions = np.stack([conversation.seg_positions for conversation in conversations])
    ids, where, positions = (torch.from_numpy(part) for part in (input_ids, placeholders(input_ids), seg_positions))
    return ids, where, positions


def _channels_first(crops: Sequence[np.ndarray]) -> torch.Tensor:
    """B arrays (F, s, s, 3) -> (B, F, 3, s, s)."""
    return torch.from_numpy(np.stack(crops)).permute(0, 1, 4, 2, 3).contiguous()


def build_dataset(dataset: DatasetConfig, num_query: int) -> RefVOSDataset:
    """One split to train on.

    Raises:
        FileNotFoundError, ValueError: files missing or malformed, no public masks, or only videos shorter than
            ``num_query`` frames.
    """
    expressions = read_expressions(dataset)
    require_annotations(dataset, expressions)
    return RefVOSDataset(trainable(expressions, num_query), FrameStore(dataset), open_masks(dataset))


def build_mixture(
    data: DataConfig, frames: FramesConfig, tokenizer: ConversationTokenizer, clip_size: int, seed: int
) -> Mixture:
    """The stream of training samples that ``data.mixture`` describes.

    Args:
        data: datasets and weights.
        frames: which frames a conversation sees.
        tokenizer: the model's.
        clip_size: side of CLIP's input in pixels.
        seed: decides every sample.
    """
    if not data.mixture:
        raise ValueError("data.mixture is empty: name at least one dataset to train on, e.g. data=shapes")
    settings = SampleSettings(frames, data.expressions_per_video, clip_size, tokenizer)
    items = list(data.mixture.values())
    datasets = [build_dataset(item.dataset, frames.num_query) for item in items]
    return Mixture(datasets, [item.weight for item in items], settings, seed)


def build_loader(
    mixture: Mixture, sample_numbers: Iterable[list[int]], num_workers: int, pad_id: int
) -> Iterator[Batch]:
    """Batches in the order of ``sample_numbers``, whatever the number of workers.

    An error in a worker is raised here with its message. Workers run with one torch thread each (DataLoader's own
    rule). The loader has a generator of its own, so that the number of workers leaves torch's global one alone.

    Args:
        mixture: the stream.
        sample_numbers: the micro-batches of this rank, as numbers of samples; may be endless.
        num_workers: loader processes; 0 loads in this process.
        pad_id: token on padding.
    """
    loader: DataLoader[Batch] = DataLoader(
        mixture,  # type: ignore[arg-type]  # collate turns its samples into batches
        batch_sampler=sample_numbers,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=num_workers,
        collate_fn=partial(collate, pad_id=pad_id),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),
    )
    return iter(loader)


def _leave_signals_to_parent(worker: int) -> None:
    """A loader process ignores SIGTERM and SIGUSR1, unless its own parent sends them.

    A scheduler that ends a job signals all its processes; the training process then still needs its loaders to finish
    the step and save.
    """
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
