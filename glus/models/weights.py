"""Weights on disk: read them safely, load them strictly, write them atomically."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What a strict load found, by tensor name."""

    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Every wanted tensor was there, in its shape, and nothing else."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        counts = (
            f"{self.matched} matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.wrong_shape)} wrong shape"
        )
        lists = [
            f"{kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("wrong shape", self.wrong_shape),
            )
            if names
        ]
        return "; ".join([counts, *lists])


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors``, ``.bin`` or ``.pt`` file, on the CPU; pickles are read with ``weights_only``.

    SAM2's files nest the state dict below ``"model"``; it is unwrapped. A folder stands for all ``.safetensors``
    files in it, as transformers shards a large model.

    Raises:
        FileNotFoundError: no such file, or a folder without such files.
        ValueError: a file does not decode, or does not hold a state dict.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no .safetensors file in {path}")
        return {name: value for file in files for name, value in read_tensors(file).items()}
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"weights {path} do not decode (cut short? not tensors alone?): {error}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (expected tensors by name)")
    return content


def load_strict(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str | Path, only: Iterable[str] | None = None
) -> LoadReport:
    """Copy tensors into ``module``, all or nothing.

    Args:
        module: receives the values, cast to its own dtype.
        tensors: by the module's state-dict names.
        source: where they come from, for messages.
        only: the names that must be there; default: the module's whole state dict.

    Returns:
        The report, which is also logged.

    Raises:
        ValueError: a tensor is missing, unexpected or of the wrong shape; nothing was loaded.
    """
    own = module.state_dict()
    wanted = set(own if only is None else only)
    report = LoadReport(
        matched=sum(name in wanted and tensors[name].shape == own[name].shape for name in tensors),
        missing=tuple(sorted(wanted - set(tensors))),
        unexpected=tuple(sorted(set(tensors) - wanted)),
        wrong_shape=tuple(
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in sorted(wanted & set(tensors))
            if tensors[name].shape != own[name].shape
        ),
    )
    if not report.is_clean:
        raise ValueError(f"weights of {source} do not fit: {report}")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    log.info("%s: %s", source, report)
    return report


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside ``path`` and rename it, so that a kill leaves no half file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def read_clip_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a transformers CLIP vision tower in a local folder, under the names of transformers 5.

    transformers 4 put ``vision_model.`` before every name; its position ids are a constant and are dropped. In a
    folder of a whole CLIP, as OpenAI's are, the text tower and the two projections are left aside.

    Raises:
        FileNotFoundError: the folder has no weights file.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            tensors = read_tensors(folder / name)
            break
    else:
        raise FileNotFoundError(f"model.clip.weights={folder}: no model.safetensors or pytorch_model.bin there")
    if any(name.startswith("text_model.") for name in tensors):
        tensors = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
    tensors = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    return {name: value for name, value in tensors.items() if not name.endswith("embeddings.position_ids")}
