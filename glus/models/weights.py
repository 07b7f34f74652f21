"""Weights from disk: read them safely, load them strictly."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import call
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from glus import distributed
from glus.files import read_object, stand_in
from glus.models.foreign import instead_of_weights, misfit_hint
from glus.models.weight_files import LazyTensor, LoadProgress

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

_PARTIAL = re.compile(r"adapter|lora|optim|exp_avg|queue|projector|consolidated", re.IGNORECASE)
"""In the names of files that are not all of a model."""
_NESTED = ("model", "state_dict", "module")
"""Where SAM2's files, Lightning's and DeepSpeed's have the state dict, among other things."""
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
    problems: Mapping[str, Sequence[str]]
    """What is wrong (``missing``, ``unexpected``, ``wrong shape``, and ``bad values``: not floating point, or NaN or
    infinite) -> the tensors of which it is true."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """What was left aside knowingly -> number of tensors."""

    @property
    def is_clean(self) -> bool:
        """Every wanted tensor was there, in its shape and finite, and nothing else."""
        return not any(self.problems.values())

    def __str__(self) -> str:
        counts = [f"{self.matched} matched", *(f"{len(names)} {kind}" for kind, names in self.problems.items())]
        dropped = [f"dropped: {', '.join(f'{n} {what}' for what, n in self.dropped.items())}"] if self.dropped else []
        lists = [
            f"{kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for kind, names in self.problems.items()
            if names
        ]
        return "; ".join([", ".join(counts), *dropped, *lists])

    def table(self) -> str:
        """One line per count, and below each the names of all tensors that are not as they should be."""
        rows: list[tuple[str, int, Sequence[str]]] = [("matched", self.matched, ())]
        rows += [(f"dropped: {what}", number, ()) for what, number in self.dropped.items()]
        rows += [(kind, len(names), names) for kind, names in self.problems.items()]
        width = max(len(title) for title, _, _ in rows)
        lines = ["\n    ".join([f"{title:<{width}}  {number:>6}", *names]) for title, number, names in rows]
        return "\n".join(lines)


class MisfitError(ValueError):
    """Weights that are not exactly those a module needs; ``report`` says which.

    Args:
        source: where the weights come from.
        report: what was found.
        hint: what may be the reason; may be empty.
    """

    def __init__(self, source: str | Path, report: LoadReport, hint: str = ""):
        super().__init__(source, report, hint)  # as arguments, so that it can travel to other processes
        self.report = report

    def __str__(self) -> str:
        source, report, hint = self.args
        return f"weights of {source} do not fit: {report}{f' ({hint})' if hint else ''}"


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors``, ``.bin`` or ``.pt`` file, on the CPU; pickles are read with ``weights_only``.

    They are mapped from the file, which is read where and when they are, and takes no memory that the system could not
    have back; only pickles of the form before torch 1.6 cannot be. Changing them does not change the file; but the file
    must not be written to (another may take its name) for as long as they are used.

    A state dict below ``"model"`` (SAM2's files), ``"state_dict"`` or ``"module"`` is unwrapped. A folder stands for
    the first of ``find_forms`` that can be read; what is wrong with those before it is logged.

    Raises:
        FileNotFoundError: no such file, a folder without such files, or a shard is missing.
        ValueError: a file does not decode or holds no state dict, or shards and index contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}{instead_of_weights(path)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        reason = stand_in(path) or _safe_reason(str(error))
        raise ValueError(f"weights {path} do not decode (cut short? not tensors alone?){reason}") from None
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        held = f"{list(content)[:_SHOWN]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds no state dict (expected tensors by name) but {held}")
    return content


def _safe_reason(text: str) -> str:
    """What a reader says of a damaged file, but never torch's advice to run what a pickle holds."""
    if "weights_only" not in text:
        return f": {text}"
    stranger = re.search(r"GLOBAL (\S+)", text)
    return f": it holds a {stranger[1]}, and only tensors are read; get its state dict alone" if stranger else ""


def find_forms(folder: Path) -> list[list[Path]]:
    """The weights in a folder, each form of them by its files: an index, a single file, or shards.

    Transformers' names count, in its order: safetensors before ``pytorch_model*.bin``, a single file before shards.
    Only where there are none, others are taken: all ``*.safetensors`` that may be a model.
    """
    forms = []
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        shards = sorted(folder.glob(f"{stem}-*-of-*.{ending}"))
        index = folder / f"{stem}.{ending}.index.json"
        forms += [[folder / f"{stem}.{ending}"], [index] if index.is_file() else shards]
    if not any(files and files[0].is_file() for files in forms):
        others = ([*folder.glob("*.safetensors")], [*folder.glob("pytorch_model*.bin")])
        forms = [sorted(file for file in files if not _PARTIAL.search(file.name)) for files in others]
    return [files for files in forms if files and files[0].is_file()]


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    forms, failures = find_forms(folder), list[Exception]()
    if not forms:
        raise FileNotFoundError(f"no *.safetensors or pytorch_model*.bin file in {folder}{instead_of_weights(folder)}")
    for files in forms:
        try:
            tensors = _read_indexed(files[0]) if files[0].suffix == ".json" else _read_shards(files)
        except (ValueError, FileNotFoundError) as error:
            failures.append(error)
            continue
        for failure in failures:
            log.warning("%s; read instead: %s", failure, files[0])
        return tensors
    raise failures[0]


def _read_indexed(index: Path) -> dict[str, torch.Tensor]:
    """The shards an index names, each of which must hold exactly the tensors that the index says."""
    try:
        weight_map = read_object(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is no index: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f'{index} is no index (expected JSON with "weight_map": {{tensor: file}})')
    joined: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if file.parent != index.parent or not file.is_file():
            raise FileNotFoundError(f"{index} names the shard {name!r}, which is not in {index.parent}")
        tensors, listed = read_tensors(file), {key for key, shard in weight_map.items() if shard == name}
        if listed != tensors.keys():
            absent, extra = sorted(listed - tensors.keys()), sorted(tensors.keys() - listed)
            raise ValueError(
                f"{file} and {index.name} contradict each other: listed but not in the file "
                f"{absent[:_SHOWN]} ({len(absent)}), in the file but not listed {extra[:_SHOWN]} ({len(extra)}); "
                "copy both again from the same source"
            )
        joined |= tensors
    return joined


def _read_shards(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of files without an index; shards carry their number and their total in their names."""
    folder, found = files[0].parent, [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    totals = {int(match[2]) for match in found}
    if len(totals) > 1 or (found and len(found) != len(files)):
        raise ValueError(f"{folder} mixes shards of several models: {[file.name for file in files]}")
    absent = sorted(set(range(1, max(totals, default=0) + 1)) - {int(match[1]) for match in found})
    if absent:
        raise FileNotFoundError(f"{folder} lacks shards {absent} of {totals.pop()}")
    joined: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = read_tensors(file)
        if twice := sorted(joined.keys() & tensors.keys()):
            raise ValueError(f"{file} repeats tensors of another file in {folder}: {', '.join(twice[:_SHOWN])}")
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

    def report(self, num_fitting: int, misfits: Mapping[str, Sequence[str]], bad: Mapping[str, str]) -> LoadReport:
        """What was found of it.

        Args:
            num_fitting: tensors of the right names and shapes.
            misfits: what is wrong with names and shapes -> tensors of which it is true.
            bad: what is wrong with the values of tensors that fit, by name.

        Raises:
            MisfitError: anything is wrong.
        """
        values = [f"{self.label(name)} {problem}" for name, problem in sorted(bad.items())]
        problems = {**misfits, **({"bad values": values} if values else {})}
        report = LoadReport(num_fitting - len(values), problems, self.dropped)
        if not report.is_clean:
            raise MisfitError(self.place, report, self.hint or misfit_hint(self.place, problems))
        log.info("%s: %s", self.place, report)
        return report


@dataclass(frozen=True)
class Target:
    """What becomes of weights that are loaded."""

    device: torch.device = CPU
    """Of the tensors that have no place yet (on the meta device); the others stay where they are."""
    stays_on_disk: bool = False
    """The module is only to be written again: its tensors are left in their files, mapped, in the files' types."""
    pack: Callable[[str, torch.Tensor], torch.Tensor] = field(default=lambda name, value: value)
    """Makes of a tensor, by its name, what the module holds in its place: quantised weights."""


IN_MEMORY = Target()
ON_DISK = Target(stays_on_disk=True)
_FITS: dict[str, Sequence[str]] = {"missing": (), "unexpected": (), "wrong shape": ()}


def load_into(module: nn.Module, read: Callable[[], Source], target: Target) -> LoadReport:
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
    on_reader = call if target.stays_on_disk else distributed.on_main

    def open_source() -> list[str]:
        source = read()
        _check_fit(own, source)
        opened.append(source)
        return list(source.tensors)

    names = on_reader(open_source)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    values, problems = _receive(own, names, trained, opened[0] if opened else Source("", {}), target)
    report = on_reader(lambda: opened[0].report(len(names), _FITS, problems))
    with torch.no_grad():
        for name in names:
            if own[name].is_meta or target.stays_on_disk:
                _place(module, name, values.pop(name))
            else:
                own[name].copy_(values.pop(name))
    return report


def _check_fit(own: Mapping[str, torch.Tensor], source: Source) -> None:
    """Compare names, shapes and types, which takes no reading; where these do not fit, read the values for the report.

    Raises:
        MisfitError: they do not fit.
    """
    tensors, label = source.tensors, source.label
    wanted = set(own if source.only is None else source.only)
    shared = wanted & tensors.keys()
    fitting = sorted(name for name in shared if tensors[name].shape == own[name].shape)
    misfits = {
        "missing": [label(name) for name in wanted - shared],
        "unexpected": [*(label(name) for name in tensors.keys() - wanted), *source.unknown],
        "wrong shape": [
            f"{label(name)} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in shared.difference(fitting)
        ],
    }
    if any(misfits.values()) or not all(tensors[name].dtype.is_floating_point for name in fitting):
        problems = {name: _value_problem(LazyTensor.of(tensors[name]).read()) for name in fitting}
        bad = {name: problem for name, problem in problems.items() if problem}
        source.report(len(fitting), {kind: sorted(names) for kind, names in misfits.items()}, bad)


def _receive(
    own: Mapping[str, torch.Tensor], names: list[str], trained: set[str], source: Source, target: Target
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors where they belong, read from ``source`` or, where it is empty, sent by the process that reads.

    Returns:
        Tensors by name, and for those whose values are none, what is wrong with them.
    """
    values: dict[str, torch.Tensor] = {}
    problems: dict[str, str] = {}
    num_bytes = sum(LazyTensor.of(tensor).nbytes for tensor in source.tensors.values())
    progress = LoadProgress(source.place, len(names), num_bytes)
    for name in names:
        read = LazyTensor.of(source.tensors.pop(name)) if name in source.tensors else None
        value = _settle(own[name], read, name in trained, target)
        if not target.stays_on_disk:
            distributed.broadcast(value)
        if read is not None:
            progress.advance(read.nbytes)
            if problem := _value_problem(value):
                problems[name] = problem
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
