"""Files of weights, written whole or not at all: safetensors, pickles, shards with an index, tensors one at a time."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from glus.atomic import naming_write_errors, whole_file


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(Path(path)) as temporary:
        try:
            save_file(content, temporary, metadata)
        except SafetensorError as error:  # also where the disk is full
            raise OSError(f"cannot write {path}: {error}") from error


def write_pickle(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a file of ``torch.save`` whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with whole_file(path) as temporary, naming_write_errors(path), temporary.open("wb") as file:
        try:
            torch.save(dict(content), file)  # given a name, torch would not tell of a full disk
        except RuntimeError as error:  # torch closes the archive in vain after the first error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class Float32File:
    """A safetensors file that is written one tensor at a time, so that no more than one is in memory.

    Format: https://huggingface.co/docs/safetensors (length of the header, header, the tensors one after the other).

    Args:
        path: is written at once; rename it, or its folder, when it is complete.
        shapes: of the tensors by name, in the order in which they will come.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = iter(shapes.values())
        self._file = path.open("wb")
        self._file.write(self._header(shapes))

    @classmethod
    def size(cls, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of the whole file."""
        return len(cls._header(shapes)) + 4 * sum(math.prod(shape) for shape in shapes.values())

    def append(self, tensor: torch.Tensor) -> None:
        """Write the next tensor: float32, on the CPU, of the shape that was announced."""
        assert tensor.dtype is torch.float32, tensor.dtype
        assert tuple(tensor.shape) == next(self._shapes), tensor.shape
        self._file.write(tensor.contiguous().view(-1).numpy().data)

    @staticmethod
    def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        header: dict[str, object] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def close(self) -> None:
        """Write what is still in memory, down to the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def write_shards(
    folder: Path, tensors: Mapping[str, torch.Tensor], ending: str, shard_bytes: int, metadata: dict[str, str]
) -> None:
    """Write tensors as numbered files of limited size and their index, under the names transformers gives them.

    Args:
        folder: exists.
        tensors: in the order in which they fill the shards.
        ending: ``safetensors``, or ``bin`` for pickles.
        shard_bytes: size that a shard does not exceed, unless by a single tensor.
        metadata: strings kept in safetensors files.
    """
    shards = list(_split(tensors, shard_bytes))
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        if ending == "safetensors":
            write_tensors(folder / name, shard, metadata)
        else:
            write_pickle(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, value in tensors.items():
        if shard and size + value.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard
