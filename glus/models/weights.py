"""Weights from disk: read them safely, load them strictly."""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from glus import distributed
from glus.models.load_progress import LoadProgress
from glus.models.weight_files import LazyTensor

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

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
        self.source, self.report, self.hint = source, report, hint

    def __reduce__(self) -> tuple[Any, ...]:
        """For the way to other processes."""
        return type(self), (self.source, self.report, self.hint)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors``, ``.bin`` or ``.pt`` file, on the CPU; pickles are read with ``weights_only``.

    They are mapped from the file, which is read where and when they are, and takes no memory that the system could not
    have back; only pickles of the form before torch 1.6 cannot be. Changing them does not change the file; but the file
    must not be written to (another may take its name) for as long as they are used.

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
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
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


@dataclass(frozen=True)
class Source:
    """Weights for a module, and what messages say of them."""

    place: str | Path
    """Where they come from."""
    tensors: dict[str, torch.Tensor | LazyTensor]
    """By the module's state-dict names; emptied while they are loaded, so that none is in memory twice."""
    only: Iterable[str] | None = None
    """The names that must be there; None: the module's whole state dict."""
    label: Callable[[str], str] = str
    """What messages call a tensor of the module: the name it has in the file."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """What was left aside knowingly -> number of tensors, for the report."""
    unknown: Iterable[str] = ()
    """Names in the file that stand for no tensor of any module; they count as unexpected."""
    hint: str = ""
    """What may be the reason if it fails."""

    def misfit(self, report: LoadReport) -> MisfitError:
        """The error that says what does not fit."""
        return MisfitError(self.place, report, self.hint)


@dataclass(frozen=True)
class Target:
    """What becomes of weights that are loaded."""

    device: torch.device = CPU
    """Of the tensors that have no place yet (on the meta device); the others stay where they are."""
    stays_on_disk: bool = False
    """The module is only to be written again: its tensors are left in their files, mapped, in the files' types."""
    pack: Callable[[str, torch.Tensor], torch.Tensor] = field(default=lambda name, value: value)
    """Makes of a tensor, by its name, what the module holds in its place: quantised weights."""


def load(module: nn.Module, read: Callable[[], Source], target: Target) -> LoadReport:
    """Bring weights into ``module``, all or nothing, one tensor at a time.

    Each is cast to the module's own type on its device and checked there. On a CPU, where type and device agree already
    and the tensor is not trained, the module uses the mapped file itself: a model then fits wherever its activations
    do. The system may drop such pages and read them again. A file that is deleted or replaced by another of its name,
    as all programs here do, stays as it was for whoever mapped it; one that is overwritten in place does not.

    In a process group every rank calls this; rank 0 alone reads and sends each tensor on. Nothing is sent of a model
    that stays on disk, which is one process's affair.

    Args:
        module: receives the values; tensors on the meta device get a place.
        read: gives the weights; called where they are read.
        target: where they go.

    Returns:
        The report, which is also logged.

    Raises:
        MisfitError: a tensor is missing, unexpected, of the wrong shape, not of a floating type, or holds NaN or
            infinity; the report lists all that are. Nothing was loaded. It is a ``ValueError``.
        FileNotFoundError, ValueError: of ``read``.
    """
    own, opened = module.state_dict(), list[Source]()
    on_reader = _alone if target.stays_on_disk else distributed.on_main

    def open_source() -> list[str]:
        source = read()
        _check_fit(own, source)
        opened.append(source)
        return list(source.tensors)

    names = on_reader(open_source)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    values, problems = _receive(own, names, trained, opened[0] if opened else None, target)
    report = on_reader(lambda: _check_values(len(names), problems, opened[0]))
    with torch.no_grad():
        for name in names:
            if own[name].is_meta or target.stays_on_disk:
                _place(module, name, values.pop(name))
            else:
                own[name].copy_(values.pop(name))
    return report


Result = TypeVar("Result")


def _alone(function: Callable[[], Result]) -> Result:
    return function()


def load_strict(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str | Path, only: Iterable[str] | None = None
) -> LoadReport:
    """``load`` of tensors that are there already, into a module on the CPU; they are kept."""
    return load(module, lambda: Source(source, dict(tensors), only), Target())


def _check_fit(own: Mapping[str, torch.Tensor], source: Source) -> None:
    """Compare names, shapes and types, which takes no reading; where these do not fit, read the values for the report.

    Raises:
        MisfitError: they do not fit.
    """
    tensors, label = source.tensors, source.label
    wanted = set(own if source.only is None else source.only)
    shared = sorted(wanted & tensors.keys())
    wrong = [name for name in shared if tensors[name].shape != own[name].shape]
    integers = [name for name in shared if name not in wrong and not tensors[name].dtype.is_floating_point]
    report = LoadReport(
        matched=0,
        missing=tuple(sorted(label(name) for name in wanted - tensors.keys())),
        unexpected=tuple(sorted([*(label(name) for name in tensors.keys() - wanted), *source.unknown])),
        wrong_shape=tuple(
            f"{label(name)} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}" for name in wrong
        ),
        bad_values=tuple(integers),
        dropped=source.dropped,
    )
    if report.is_clean:
        return
    fitting = [name for name in shared if name not in wrong]
    problems = {name: _value_problem(LazyTensor.of(tensors[name]).read()) for name in fitting}
    bad = tuple(f"{label(name)} {problem}" for name, problem in problems.items() if problem)
    raise source.misfit(replace(report, matched=len(fitting) - len(bad), bad_values=bad))


def _receive(
    own: Mapping[str, torch.Tensor], names: list[str], trained: set[str], source: Source | None, target: Target
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors where they belong, read from ``source`` or, where that is None, sent by the process that reads.

    Returns:
        Tensors by name, and for those whose values are none, what is wrong with them.
    """
    values: dict[str, torch.Tensor] = {}
    problems: dict[str, str] = {}
    num_bytes = sum(LazyTensor.of(tensor).nbytes for tensor in source.tensors.values()) if source is not None else 0
    progress = LoadProgress(source.place if source is not None else "", len(names), num_bytes)
    for name in names:
        read = LazyTensor.of(source.tensors.pop(name)) if source is not None else None
        value = _settle(own[name], read, name in trained, target)
        if not target.stays_on_disk:
            distributed.broadcast(value)
        if read is not None:
            progress.advance(read.nbytes)
            problem = _value_problem(value)
            problems |= {name: problem} if problem else {}
        values[name] = target.pack(name, value)
    return values, problems


def _settle(place: torch.Tensor, read: LazyTensor | None, is_trained: bool, target: Target) -> torch.Tensor:
    """A tensor to take ``place``: with the values that are read, or with room for those that will be sent."""
    if read is not None:
        fits = place.is_meta and target.device.type == "cpu" and place.dtype is read.dtype and not is_trained
        if target.stays_on_disk or (fits and read.is_stored):
            return read.read().contiguous()
    value = torch.empty(place.shape, dtype=place.dtype, device=target.device if place.is_meta else place.device)
    return value if read is None else value.copy_(read.read())


def _check_values(num_tensors: int, problems: Mapping[str, str], source: Source) -> LoadReport:
    """The report on tensors that all fit.

    Raises:
        MisfitError: there are problems with their values.
    """
    bad = tuple(f"{source.label(name)} {problems[name]}" for name in sorted(problems))
    report = LoadReport(num_tensors - len(bad), (), (), (), bad, source.dropped)
    if bad:
        raise source.misfit(report)
    log.info("%s: %s", source.place, report)
    return report


def _place(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make a tensor the module's own, in place of one without memory."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    before = getattr(owner, leaf)
    if isinstance(before, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, before.requires_grad)
    setattr(owner, leaf, value)


def _value_problem(value: torch.Tensor) -> str:
    """What is wrong with a weight's values; empty if nothing is."""
    if not value.is_floating_point():
        return f"is {str(value.dtype).removeprefix('torch.')}, expected floating point"
    if value.numel() and not all(bool(end.isfinite()) for end in value.aminmax()):  # both are NaN if one value is
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
