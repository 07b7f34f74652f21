"""Files of weights, written whole or not at all, with no more than one tensor in memory that is not there already."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from glus.files import atomic_file, hidden_sibling, naming_write_errors

_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64
"""Bytes; at least that of any type."""


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
        if dtype is self.dtype:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype), is_stored=False)


Tensors = Mapping[str, torch.Tensor | LazyTensor]


class SafetensorsFile:
    """A safetensors file that is written one tensor at a time, which the library cannot do.

    Format: https://huggingface.co/docs/safetensors (length of the header, header, the tensors one after the other).

    Args:
        path: is written at once; rename it, or its folder, when it is complete.
        layout: shape and type of the tensors by name, in the order in which they will come; types that take more
            bytes come first, so that every tensor is aligned.
        metadata: strings kept in the header.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ):
        self._layout = iter(layout.values())
        self._file = path.open("wb")
        self._file.write(self._header(layout, metadata or {}))

    @classmethod
    def size(cls, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
        """Bytes of the whole file, without metadata."""
        content = sum(dtype.itemsize * math.prod(shape) for shape, dtype in layout.values())
        return len(cls._header(layout, {})) + content

    def append(self, tensor: torch.Tensor) -> None:
        """Write the next tensor: of the shape and type that were announced, on any device."""
        assert (tuple(tensor.shape), tensor.dtype) == next(self._layout), (tensor.shape, tensor.dtype)
        values = tensor.detach().cpu().contiguous().flatten()
        self._file.write(values.view(torch.uint8).numpy().data)

    @staticmethod
    def _header(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]) -> bytes:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end, widths = 0, [dtype.itemsize for _, dtype in layout.values()]
        assert widths == sorted(widths, reverse=True), "wide types come first"
        for name, (shape, dtype) in layout.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def close(self) -> None:
        """Write what is still in memory, down to the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def write_tensors(path: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    named = ((name, LazyTensor.of(tensor)) for name, tensor in tensors.items())
    content = dict(sorted(named, key=lambda item: -item[1].dtype.itemsize))
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}
    with (
        atomic_file(path) as temporary,
        naming_write_errors(path),
        closing(SafetensorsFile(temporary, layout, metadata)) as file,
    ):
        for tensor in content.values():
            file.append(tensor.read())


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
    content = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    split = split_state_dict_into_shards_factory(
        content,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{stem}{{suffix}}.{ending}",
        max_shard_size=shard_bytes,
    )
    for name, members in split.filename_to_tensors.items():
        shard = {member: content[member] for member in members}
        if ending == "safetensors":
            write_tensors(folder / name, shard, metadata)
        else:
            write_pickle(folder / name, _read_beside(folder / name, shard))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _read_beside(path: Path, shard: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
    """All tensors of a pickle, which ``torch.save`` wants at once: those that are computed lie in a nameless file
    beside ``path``, for as long as they are used, instead of in memory."""
    computed = {name: tensor for name, tensor in shard.items() if not tensor.is_stored}
    sizes = [math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in computed.values()]
    values, start = {}, 0
    if sum(sizes):
        scratch = hidden_sibling(path.with_name(f"{path.name}.values"))
        with naming_write_errors(path), scratch.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, sum(sizes))  # a full disk is told here, not by a signal later
        room = torch.UntypedStorage.from_file(str(scratch), shared=True, nbytes=sum(sizes))
        scratch.unlink()
        for (name, tensor), size in zip(computed.items(), sizes, strict=True):
            place = torch.empty(0, dtype=tensor.dtype).set_(room[start : start + tensor.nbytes])
            values[name] = place.view(tensor.shape).copy_(tensor.read())
            start += size
    return {name: values[name] if name in values else _whole(tensor.read()) for name, tensor in shard.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, without the rest of what it is a part of, which ``torch.save`` would write too."""
    is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_part else tensor.cpu().contiguous()
