"""Weights from disk: read them safely, load them strictly."""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

log = logging.getLogger(__name__)

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError),
    *(struct.error, LookupError, AttributeError, AssertionError, TypeError, ValueError),
)
"""What the readers raise at a damaged file, depending on the byte (measured: cut and flipped at random)."""
_SHOWN = 5
"""Names of one kind that a message lists; a report's table lists all."""


@dataclass(frozen=True)
class LoadReport:
    """What a strict load found, by tensor name."""

    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    bad_values: tuple[str, ...] = ()
    """Not floating point, or holding NaN or infinity."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """What was left aside knowingly -> number of tensors."""

    @property
    def is_clean(self) -> bool:
        """Every wanted tensor was there, in its shape and finite, and nothing else."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.bad_values)

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """What is wrong -> the tensors of which it is true."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": self.wrong_shape}
        return kinds | ({"bad values": self.bad_values} if self.bad_values else {})

    def __str__(self) -> str:
        kinds = self.kinds()
        counts = ", ".join([f"{self.matched} matched", *(f"{len(names)} {kind}" for kind, names in kinds.items())])
        dropped = [f"dropped: {', '.join(f'{n} {what}' for what, n in self.dropped.items())}"] if self.dropped else []
        lists = [
            f"{kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for kind, names in kinds.items()
            if names
        ]
        return "; ".join([counts, *dropped, *lists])

    def table(self) -> str:
        """One line per count, and below each the names of all tensors that are not as they should be."""
        rows: list[tuple[str, int, tuple[str, ...]]] = [("matched", self.matched, ())]
        rows += [(f"dropped: {what}", number, ()) for what, number in self.dropped.items()]
        rows += [(kind, len(names), names) for kind, names in self.kinds().items()]
        width = max(len(title) for title, _, _ in rows)
        lines = []
        for title, number, names in rows:
            lines += [f"{title:<{width}}  {number:>6}", *(f"    {name}" for name in names)]
        return "\n".join(lines)


class MisfitError(ValueError):
    """Weights that are not exactly those a module needs; ``report`` says which.

    Args:
        source: where the weights come from.
        report: what was found.
        hint: what may be the reason; may be empty.
    """

    def __init__(self, source: str | Path, report: LoadReport, hint: str = ""):
        super().__init__(f"weights of {source} do not fit: {report}{f' ({hint})' if hint else ''}")
        self.report = report


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors``, ``.bin`` or ``.pt`` file, on the CPU; pickles are read with ``weights_only``.

    SAM2's files nest the state dict below ``"model"``; it is unwrapped. A folder stands for all tensors in it as
    transformers writes them: shards with an index, or safetensors files, or ``pytorch_model*.bin``; safetensors
    are preferred where both are there.

    Raises:
        FileNotFoundError: no such file, a folder without such files, or a shard is missing.
        ValueError: a file does not decode or holds no state dict, or shards and index contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"weights {path} do not decode (cut short? not tensors alone?): {error}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (expected tensors by name)")
    return content


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    for pattern, index in zip(("*.safetensors", "pytorch_model*.bin"), INDEX_FILES, strict=True):
        if (folder / index).is_file():
            return _read_indexed(folder / index)
        files = sorted(folder.glob(pattern))
        if files:
            _check_shards_complete(files)
            return _join({file: read_tensors(file) for file in files})
    raise FileNotFoundError(f"no *.safetensors or pytorch_model*.bin file in {folder}")


def _read_indexed(index: Path) -> dict[str, torch.Tensor]:
    """The shards an index names, each of which must hold exactly the tensors that the index says."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{index} is no index (expected JSON with "weight_map": {{tensor: file}})') from error
    shards = {name: read_tensors(_shard(index, name)) for name in sorted(set(weight_map.values()))}
    for name, tensors in shards.items():
        listed = {key for key, file in weight_map.items() if file == name}
        if listed != tensors.keys():
            absent, extra = sorted(listed - tensors.keys()), sorted(tensors.keys() - listed)
            raise ValueError(
                f"{index.parent / name} and {index.name} contradict each other: listed but not in the file "
                f"{absent[:_SHOWN]} ({len(absent)}), in the file but not listed {extra[:_SHOWN]} ({len(extra)}); "
                "copy both again from the same source"
            )
    return _join({index.parent / name: tensors for name, tensors in shards.items()})


def _shard(index: Path, name: str) -> Path:
    if Path(name).name != name or not (index.parent / name).is_file():
        raise FileNotFoundError(f"{index} names the shard {name!r}, which is not in {index.parent}")
    return index.parent / name


def _check_shards_complete(files: list[Path]) -> None:
    """Shards without an index carry their number and their total in their names."""
    found = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    totals = {int(match[2]) for match in found}
    if len(totals) > 1 or (found and len(found) != len(files)):
        raise ValueError(f"{files[0].parent} mixes shards of several models: {[file.name for file in files]}")
    absent = sorted(set(range(1, max(totals, default=0) + 1)) - {int(match[1]) for match in found})
    if absent:
        raise FileNotFoundError(f"{files[0].parent} lacks shards {absent} of {totals.pop()}")


def _join(shards: Mapping[Path, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    joined: dict[str, torch.Tensor] = {}
    for file, tensors in shards.items():
        twice = sorted(joined.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{file} repeats tensors of another file in {file.parent}: {', '.join(twice[:_SHOWN])}")
        joined |= tensors
    return joined


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    source: str | Path,
    only: Iterable[str] | None = None,
    label: Callable[[str], str] = str,
    dropped: Mapping[str, int] | None = None,
    unknown: Iterable[str] = (),
    hint: str = "",
) -> LoadReport:
    """Copy tensors into ``module``, all or nothing.

    Args:
        module: receives the values, cast to its own dtype.
        tensors: by the module's state-dict names.
        source: where they come from, for messages.
        only: the names that must be there; default: the module's whole state dict.
        label: what messages call a tensor of the module: the name it has in the file.
        dropped: what was left aside knowingly -> number of tensors, for the report.
        unknown: names in the file that stand for no tensor of any module; they count as unexpected.
        hint: what may be the reason if it fails.

    Returns:
        The report, which is also logged.

    Raises:
        MisfitError: a tensor is missing, unexpected, of the wrong shape, not of a floating type, or holds NaN or
            infinity; nothing was loaded. It is a ``ValueError``.
    """
    own = module.state_dict()
    wanted = set(own if only is None else only)
    shared = sorted(wanted & set(tensors))
    fitting = [name for name in shared if tensors[name].shape == own[name].shape]
    problems = {name: _value_problem(tensors[name]) for name in fitting}
    report = LoadReport(
        matched=sum(not problem for problem in problems.values()),
        missing=tuple(sorted(label(name) for name in wanted - set(tensors))),
        unexpected=tuple(sorted([*(label(name) for name in set(tensors) - wanted), *unknown])),
        wrong_shape=tuple(
            f"{label(name)} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in shared
            if name not in problems
        ),
        bad_values=tuple(f"{label(name)} {problem}" for name, problem in problems.items() if problem),
        dropped=dropped or {},
    )
    if not report.is_clean:
        raise MisfitError(source, report, hint)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    log.info("%s: %s", source, report)
    return report


def _value_problem(value: torch.Tensor) -> str:
    """What is wrong with a weight's values; empty if nothing is."""
    if not value.is_floating_point():
        return f"is {str(value.dtype).removeprefix('torch.')}, expected floating point"
    if not bool(torch.isfinite(value).all()):
        return f"holds {int((~torch.isfinite(value)).sum())} values that are NaN or infinite"
    return ""


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
