"""Files of weights, written whole or not at all, with no more than one tensor in memory that is not there already."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from glus import distributed
from glus.files import atomic_file, hidden_sibling, naming_write_errors

GB = 10**9
QUIET_BYTES = GB
"""Less is read in silence."""
SECONDS = {True: 0.5, False: 10.0}
"""Between two lines on a terminal, where one replaces the other, and in a file."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is read, so that a whole model of them takes no memory."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """Gives it; what it gives is not to be changed."""
    is_stored: bool = False
    """Whether reading takes no memory: it is in memory already, or mapped from a file."""

    @classmethod
    def of(cls, tensor: torch.Tensor | LazyTensor) -> LazyTensor:
        """A tensor that is there."""
        if isinstance(tensor, LazyTensor):
            return tensor
        return cls(tensor.shape, tensor.dtype, tensor.detach, is_stored=True)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
        """What ``change`` makes of it, of the same shape and type."""
        return replace(self, read=lambda: change(self.read()), is_stored=False)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values in another type."""
        return self if dtype is self.dtype else replace(self.map(lambda value: value.to(dtype)), dtype=dtype)


Tensors = Mapping[str, torch.Tensor | LazyTensor]


class SafetensorsFile:
    """A safetensors file whose tensors come one by one, which the library cannot write: until it is closed, they lie in
    nameless files beside it instead of in memory.

    Args:
        path: is written when the file is closed; rename it, or its folder, when it is complete.
        layout: shapes and types of the tensors by name, in the order in which they will come.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        self._path, self._expected = path, iter(layout.items())
        self._tensors: dict[str, torch.Tensor] = {}

    def append(self, tensor: torch.Tensor) -> None:
        """Take the next tensor: of the shape and type that were announced, on any device.

        Raises:
            OSError: there is no room for it.
        """
        name, expected = next(self._expected)
        assert (tuple(tensor.shape), tensor.dtype) == expected, (name, tensor.shape, tensor.dtype)
        self._tensors[name] = _spilled(self._path, tensor)

    def close(self) -> None:
        """Write the file."""
        _save(self._tensors, self._path, {})


def write_tensors(path: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with atomic_file(path) as temporary, naming_write_errors(path):
        _save(_materialise(path, tensors), temporary, metadata)


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    try:
        save_file(tensors, path, dict(metadata))
    except SafetensorError as error:  # all that can fail here is the system
        raise OSError(errno.EIO, str(error)) from error
    path.chmod(0o644)  # safetensors lets nobody but the owner read


def write_pickle(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a file of ``torch.save`` whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with atomic_file(path) as temporary, naming_write_errors(path), temporary.open("wb") as file:
        try:
            torch.save(dict(content), file)  # given a name, torch would not tell of a full disk
        except RuntimeError as error:  # torch closes the archive in vain after the first error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_shards(folder: Path, tensors: Tensors, ending: str, shard_bytes: int, metadata: Mapping[str, str]) -> None:
    """Write tensors as numbered files of limited size and their index, under the names transformers gives them.

    Args:
        folder: exists.
        tensors: in the order in which they fill the shards; what fits into one file becomes one without an index.
        ending: ``safetensors``, or ``bin`` for pickles.
        shard_bytes: size that a shard does not exceed, unless by a single tensor.
        metadata: strings kept in safetensors files.
    """
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: LazyTensor.of(tensor).nbytes,
        filename_pattern=f"{stem}{{suffix}}.{ending}",
        max_shard_size=shard_bytes,
    )
    for name, members in split.filename_to_tensors.items():
        shard = {member: tensors[member] for member in members}
        if ending == "safetensors":
            write_tensors(folder / name, shard, metadata)
        else:
            with naming_write_errors(folder / name):
                values = _materialise(folder / name, shard)
            write_pickle(folder / name, values)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _materialise(path: Path, tensors: Tensors) -> dict[str, torch.Tensor]:
    """All tensors of a file, which the libraries want at once: those that are computed lie beside ``path`` on the disk,
    for as long as they are used, instead of in memory."""
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    return {name: _whole(item.read()) if item.is_stored else _spilled(path, item.read()) for name, item in lazy.items()}


def _spilled(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU whose memory is a nameless file beside ``path``."""
    if not tensor.numel():
        return tensor.cpu()
    scratch = hidden_sibling(path.with_name(f"{path.name}.values"))
    with scratch.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is told here, not by a signal later
            copy = torch.from_file(str(scratch), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            scratch.unlink()
    return copy.view(tensor.shape).copy_(tensor.detach())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, without the rest of what it is a part of, which ``torch.save`` would write too."""
    is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_part else tensor.cpu().contiguous()


class LoadProgress:
    """How much of some weights rank 0 has read: in place on a terminal, otherwise a line every ten seconds.

    Args:
        source: where they come from.
        num_tensors: how many will be read.
        num_bytes: of all of them, in the file.
    """

    def __init__(self, source: str | Path, num_tensors: int, num_bytes: int):
        self._source, self._num_tensors, self._num_bytes = source, num_tensors, num_bytes
        self._is_terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()
        self._tensors = self._bytes = 0

    def advance(self, num_bytes: int) -> None:
        """One more tensor is read."""
        self._tensors, self._bytes = self._tensors + 1, self._bytes + num_bytes
        is_last, now = self._tensors == self._num_tensors, time.monotonic()
        is_due = is_last or now - self._shown >= SECONDS[self._is_terminal]
        if distributed.rank() or self._num_bytes < QUIET_BYTES or not is_due:
            return
        self._shown = now
        text = (
            f"{self._source}: {self._bytes / GB:.1f} of {self._num_bytes / GB:.1f} GB, "
            f"{self._tensors:,} of {self._num_tensors:,} tensors, {now - self._started:.0f} s"
        )
        start, end = ("\r", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
