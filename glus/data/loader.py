"""From configs to a stream of batches: the only place of the data layer that takes configs apart."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from glus.batch import Batch
from glus.config import DataConfig, DatasetConfig, FramesConfig
from glus.data.benchmarks.index import open_masks, read_expressions, require_annotations, trainable
from glus.data.chat import Chat
from glus.data.dataset import Mixture, RefVOSDataset, SampleSettings, collate
from glus.data.frames import FrameStore
from glus.types import Expression, Role


def training_expressions(dataset: DatasetConfig, num_query: int) -> list[Expression]:
    """What can be trained on in a split.

    Raises:
        FileNotFoundError, ValueError: files missing or malformed, or no public masks.
    """
    expressions = read_expressions(dataset)
    require_annotations(dataset, expressions)
    return trainable(expressions, num_query)


def build_dataset(dataset: DatasetConfig, num_query: int) -> RefVOSDataset:
    """One split to train on.

    Raises:
        FileNotFoundError, ValueError: files missing or malformed, no public masks, or only videos shorter than
            ``num_query`` frames.
    """
    return RefVOSDataset(training_expressions(dataset, num_query), FrameStore(dataset), open_masks(dataset))


def build_mixture(
    data: DataConfig,
    frames: FramesConfig,
    chat: Chat,
    prepare: Callable[[np.ndarray, Role], np.ndarray],
    seed: int,
) -> Mixture:
    """The stream of training samples that ``data.mixture`` describes.

    Args:
        data: datasets and weights.
        frames: which frames a conversation sees.
        chat: the grammar of the model's conversations.
        prepare: ``Mllm.prepare``.
        seed: decides every sample.
    """
    if not data.mixture:
        raise ValueError("data.mixture is empty: name at least one dataset to train on, e.g. data=shapes")
    settings = SampleSettings(frames, data.expressions_per_video, prepare, chat)
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
