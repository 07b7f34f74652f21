"""From a run's config to a stream of batches."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.queues import Queue, SimpleQueue
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from glus import distributed
from glus.batch import Batch
from glus.config import GIB, DataConfig, DatasetConfig, FramesConfig
from glus.data.benchmarks.index import open_masks, read_expressions, require_annotations, require_texts, trainable
from glus.data.chat import Chat
from glus.data.dataset import Mixture, RefVOSDataset, SampleSettings, collate
from glus.data.frames import FrameStore
from glus.types import Expression, PrepareFrame

SHARED_MEMORY = Path("/dev/shm")
"""Where loader processes put what they pass on (Linux)."""
PREFETCHED = 2
"""Micro-batches that a loader process keeps ready: torch's default."""
POLL_SECONDS = 1.0
"""After which waiting for a loader process looks up."""


def training_expressions(dataset: DatasetConfig, num_query: int) -> list[Expression]:
    """What can be trained on in a split.

    Raises:
        FileNotFoundError, ValueError: files missing or malformed, a sentence is no text, or no public masks.
    """
    expressions = read_expressions(dataset)
    require_annotations(dataset, expressions)
    require_texts(expressions)
    return trainable(expressions, num_query)


def build_dataset(dataset: DatasetConfig, num_query: int) -> RefVOSDataset:
    """One split to train on.

    Raises:
        FileNotFoundError, ValueError: files missing or malformed, no public masks, or only videos shorter than
            ``num_query`` frames.
        OSError: the masks cannot be packed anywhere (see ``MaskPack``).
    """
    expressions, masks = training_expressions(dataset, num_query), open_masks(dataset)
    distributed.on_main(masks.open)  # packing takes much memory: not in every rank and loader process at once
    return RefVOSDataset(expressions, FrameStore(dataset), masks)


def build_mixture(data: DataConfig, frames: FramesConfig, chat: Chat, prepare: PrepareFrame, seed: int) -> Mixture:
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


def shared_memory_advice(least_gib: float) -> str:
    """What to do about a ``/dev/shm`` that is smaller than this."""
    return f"docker run --shm-size={math.ceil(least_gib)}g, or data.num_workers=1 (0: none is used)"


class Batches(Iterator[Batch]):
    """What a loader gives, waited for a second at a time, so that neither a signal nor a loader's end is missed.

    Args:
        loader: times out after ``POLL_SECONDS`` if it has processes.
        failures: why loader processes could not send a batch.
    """

    def __init__(self, loader: DataLoader[Batch], failures: SimpleQueue[str]):
        self._num_workers, self._failures = loader.num_workers, failures
        self._room = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
        self._is_first = True
        self._batches = iter(loader)

    def __next__(self) -> Batch:
        batch = self.take(lambda: False)
        assert batch is not None
        return batch

    def take(self, is_given_up: Callable[[], bool]) -> Batch | None:
        """The next batch, or None once it is given up, which is asked every second.

        Raises:
            ValueError: what loader processes keep ready does not fit into the shared memory; by the first batch's size.
            ChildProcessError: a loader process has died, or cannot send. Whatever it raised itself is passed on.
        """
        while True:
            try:
                batch: Batch = next(self._batches)
                break
            except RuntimeError as error:
                self._raise_if_lost(error)
                if not str(error).startswith("DataLoader timed out"):
                    raise
                pinning = getattr(self._batches, "_pin_memory_thread", None)  # torch has one where there is a GPU
                if pinning and not pinning.is_alive():
                    raise ChildProcessError("the thread that pins batches for the GPU has ended, see above") from error
            if is_given_up():
                return None
        if self._is_first:
            self._is_first = False
            self._check_room(batch)
        return batch

    def _raise_if_lost(self, error: RuntimeError) -> None:
        if not self._failures.empty() or str(error).startswith("DataLoader worker"):
            reason = error if self._failures.empty() else self._failures.get()
            raise ChildProcessError(
                f"a loader process has failed ({reason}), as a rule for want of memory or of shared memory "
                f"({SHARED_MEMORY} had {(self._room or 0) / 2**20:,.1f} MiB free): {shared_memory_advice(1)}"
            ) from error

    def _check_room(self, batch: Batch) -> None:
        needed = self._num_workers * PREFETCHED * batch.num_bytes
        if self._room is not None and self._room < needed:
            raise ValueError(
                f"{SHARED_MEMORY} has {self._room / 2**20:,.1f} MiB free; {self._num_workers} loader processes need "
                f"{needed / 2**20:,.1f}: {shared_memory_advice(needed / GIB)}"
            )


def build_loader(mixture: Mixture, sample_numbers: Iterable[list[int]], num_workers: int, pad_id: int) -> Batches:
    """Batches in the order of ``sample_numbers``, whatever the number of workers.

    An error in a worker is raised here with its message. Workers run with one torch thread each (DataLoader's own
    rule). The loader has a generator of its own, so that the number of workers leaves torch's global one alone.

    Args:
        mixture: the stream.
        sample_numbers: the micro-batches of this rank, as numbers of samples; may be endless.
        num_workers: loader processes; 0 loads in this process.
        pad_id: token on padding.
    """
    failures: SimpleQueue[str] = multiprocessing.SimpleQueue()
    loader: DataLoader[Batch] = DataLoader(
        mixture,  # type: ignore[arg-type]  # collate turns its samples into batches
        batch_sampler=sample_numbers,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=num_workers,
        collate_fn=partial(collate, pad_id=pad_id),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, failures),
        timeout=POLL_SECONDS if num_workers else 0,
        generator=torch.Generator(),
    )
    return Batches(loader, failures)


def _start_worker(failures: SimpleQueue[str], worker: int) -> None:
    """Tell what the thread fails at that sends the batches of a loader process: torch would wait for them in vain."""

    def tell(error: Exception, item: object) -> None:
        failures.put(f"{type(error).__name__}: {error}")

    Queue._on_queue_feeder_error = staticmethod(tell)  # type: ignore[attr-defined]
    _leave_signals_to_parent()


def _leave_signals_to_parent() -> None:
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
