"""Weights into the network and out of it: from the files that a config names, and from and to model folders."""

from __future__ import annotations

import copy
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from glus import distributed
from glus.config import (
    FuserGamma,
    ModelConfig,
    ModelFolderConfig,
    Precision,
    Quantization,
    SegHeadInit,
    SettingsConfig,
    override_settings,
    read_config,
    to_yaml,
)
from glus.files import atomic_folder
from glus.models.build import DTYPES, assemble, complete, quantize, trainable_names
from glus.models.foreign import instead_of_weights, is_hub_id
from glus.models.glus import Glus
from glus.models.mllm.adapters import NewRows, merged_weight, plain_names, second_names
from glus.models.published import published_source
from glus.models.release_layout import (
    CLIP_KEYS,
    SAM2_KEYS,
    KeyMap,
    check_inv_freq,
    check_llm_config,
    lisa,
    replace_start,
)
from glus.models.weight_files import LazyTensor, Tensors, write_shards
from glus.models.weights import IN_MEMORY, ON_DISK, LoadReport, Source, Target, find_forms, load_into, read_tensors
from glus.tokens import AnyVocabulary, open_vocabulary

log = logging.getLogger(__name__)

TRAINED_FILE = "trained.safetensors"
COMPLETE_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
BEST_LINK = "best"
"""In ``checkpoints/`` of a run with ``trainer.keep_best``."""
SHARD_BYTES = 5 * 10**9
"""A complete model that is larger is written as shards with an index."""
MERGED_PARTS = ("lora", "embeddings_new_rows", "lm_head_new_rows")
"""Parts of ``model.trainable`` that a merged model no longer has."""
IOU_HEAD = "iou_head."
"""How the names of the tensors begin that a model may do without."""

_FORMER = (("clip.", "mllm.clip."), ("projector.", "mllm.projector."), ("language.llama.", "mllm.llama."))
"""How names began in model folders and checkpoints of before the MLLM was one part of the network, and now."""
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
Value = TypeVar("Value")


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory."""

    glus: Glus
    vocabulary: AnyVocabulary
    config: ModelFolderConfig


def build_glus(config: ModelConfig, load_weights: bool = True, target: Target = IN_MEMORY) -> Glus:
    """The network, with the weights the config names, its trained parts marked by ``requires_grad``.

    In a process group every rank calls this: rank 0 reads, and in the end all have the same tensors.

    Args:
        config: sizes, weights, trainable parts.
        load_weights: False leaves everything at random and unquantised.
        target: where the weights go; default: the CPU.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: weights do not fit, or ``model.trainable`` names no part.
    """
    if not load_weights:
        return assemble(config)
    has_start = bool(config.weights)
    glus = assemble(config, has_start or bool(config.clip.weights), has_start or bool(config.llm.weights))
    target = quantize(glus, config, target)
    random = [tensor for tensor in (*glus.parameters(), *glus.buffers()) if not tensor.is_meta]
    if config.weights:
        load_start(glus, config.weights, target)
    else:
        load_parts(glus, config, target)
    complete(glus)
    if not target.stays_on_disk:
        for tensor in random:  # those that are random still, though each rank drew them with the same seed
            distributed.broadcast(tensor)
    return glus.to(target.device)


def load_parts(glus: Glus, config: ModelConfig, target: Target = IN_MEMORY) -> dict[str, LoadReport]:
    """Load the pretrained towers the config names, each strictly.

    Returns:
        Name of the config's field -> what was loaded, under the file's names.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: weights do not fit, or ``model.seg_head_init`` asks for a head that they do not hold.
    """
    reports = {}
    layouts = {"clip": CLIP_KEYS, "segmenter": SAM2_KEYS, "llm": lisa(config.seg_head_init)}
    if glus.mllm.PUBLISHED:  # the whole MLLM lies in one folder
        layouts = {"segmenter": SAM2_KEYS, "llm": KeyMap(glus.mllm.PUBLISHED)}
    for part, layout in layouts.items():
        place = getattr(config, part).weights
        if place:
            read = partial(_part_source, glus, config, part, place, layout)
            reports[f"model.{part}.weights"] = load_into(glus, read, target)
    if config.seg_head_init is SegHeadInit.lisa and (glus.mllm.PUBLISHED or not config.llm.weights):
        raise ValueError("model.seg_head_init=lisa: set model.llm.weights to the folder of LISA-7B-v1, which holds it")
    return reports


def _part_source(glus: Glus, config: ModelConfig, part: str, place: str, layout: KeyMap) -> Source:
    """All that ``layout`` may hold, but for LLaVA's projector, which comes with some LLMs only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is of another LLM.
    """
    try:
        if part == "llm" and glus.mllm.PUBLISHED:
            source = published_source(config, glus.mllm, place)
        else:
            source = _single_source(config, part, place, layout)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model.{part}.weights={place}: {error}") from error
    has_projector = any(name.startswith("mllm.projector.") for name in source.tensors)
    held = tuple(ours for _, ours in layout.renamed if has_projector or ours != "mllm.projector.")
    return under_adapters(glus, replace(source, only=[name for name in loaded_names(glus) if name.startswith(held)]))


def _single_source(config: ModelConfig, part: str, place: str, layout: KeyMap) -> Source:
    """LISA-7B-v1 is an LLM: all rows of GLUS's tokens are in it, so none is added; its SAM-1 is left aside."""
    if part == "llm":
        check_llm_config(Path(place) if Path(place).is_dir() else Path(place).parent, config)
    tensors = read_tensors(place)
    if part == "llm":
        check_inv_freq(tensors, config.llm.architecture, place)
    return layout.source(place, tensors)


def load_start(glus: Glus, folder: str, target: Target) -> None:
    """Load all weights of another model, its adapters merged and its memory encoder as trained.

    Either may have an IoU head alone: this one's is then at random, or the other's left aside.

    Raises:
        FileNotFoundError: ``folder`` is no model folder and no run.
        ValueError: its tensors are not exactly these.
    """

    def read() -> Source:
        start = load_to_merge(folder)
        has_both = glus.iou_head is not None and start.glus.iou_head is not None
        left_out = () if has_both else (IOU_HEAD,)
        tensors = {name: value for name, value in merged_tensors(start).items() if not name.startswith(left_out)}
        only = [name for name in loaded_names(glus) if not name.startswith(left_out)]
        return under_adapters(glus, Source(folder, tensors, only))

    load_into(glus, read, target)


def loaded_names(glus: Glus) -> list[str]:
    """Names of the tensors that another model has too, as they are without adapters."""
    return [name for name in plain_names(glus) if not name.endswith(".new_rows")]


def under_adapters(glus: Glus, source: Source) -> Source:
    """Weights of a model without adapters for one that may have them."""
    actual, label = plain_names(glus), source.label  # of a source whose own tensors nothing here may hold
    plain = {now: before for before, now in actual.items()}
    return replace(
        source,
        tensors={actual.get(name, name): tensor for name, tensor in source.tensors.items()},
        only=[actual[name] for name in source.only or loaded_names(glus)],
        label=lambda name: label(plain.get(name, name)),
    )


def load_to_merge(path: str | Path) -> LoadedModel:
    """A model folder or run whose tensors stay in their files, for ``merged_tensors``: adapters go into the
    full-precision weights, also those trained over quantised ones, and the memory encoder is as trained."""
    unquantized = SettingsConfig(llm_quantization=Quantization.none)
    return load_model(path, settings=unquantized, as_trained=True, target=ON_DISK)


def merged_tensors(model: LoadedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor | LazyTensor]:
    """The state dict with adapters and new rows merged in the model's precision, each tensor made when it is read.

    Args:
        model: on disk or in memory.
        dtype: of all tensors in the end; None leaves those that merging does not change in a narrower type, in which
            they may be stored.

    Raises:
        ValueError: a weight is quantised; its steps are coarser than what adapters learn.
    """
    from peft.tuners.lora import LoraLayer

    glus, precision = model.glus, DTYPES[model.config.model.precision]
    again = set() if is_untied(model.config.model) else second_names(glus)
    adapters = {f"{name}.": module for name, module in glus.named_modules() if isinstance(module, LoraLayer)}
    tables = {f"{name}.weight": module for name, module in glus.named_modules() if isinstance(module, NewRows)}
    merged: dict[str, torch.Tensor | LazyTensor] = {}
    for name, value in glus.state_dict().items():
        if ".lora_" in name or name.endswith(".new_rows") or name in again:
            continue
        adapted, base, _ = name.partition("base_layer.")
        if not value.is_floating_point():
            raise ValueError(f"{name} is quantised: load the model unquantised, then merge")
        tensor = LazyTensor.of(value)
        if base or name in tables or torch.promote_types(value.dtype, precision) is not precision:
            tensor = tensor.to(precision)
        if name in tables:
            tensor = tensor.map(tables[name].with_rows)
        if base and name.endswith(".weight"):
            tensor = tensor.map(partial(merged_weight, adapters[adapted]))
        merged[name.replace("base_layer.", "")] = tensor.to(dtype or tensor.dtype)
    return merged


def is_untied(config: ModelConfig) -> bool:
    """Whether a head that was the embedding table is so no more, once new rows are merged into either."""
    return config.llm.tied and any(part.endswith("_new_rows") for part in config.trainable)


def save_merged(folder: Path, model: LoadedModel, dtype: torch.dtype | None, source: str) -> None:
    """Write a folder of a model that needs nothing else, neither adapters nor the files that its config names.

    Args:
        folder: must not exist.
        model: what ``load_to_merge`` gives.
        dtype: of the stored weights; None: the model's.
        source: its name, which is kept in the weights file.

    Raises:
        OSError: the folder cannot be written, or is there.
        ValueError: a weight is quantised.
    """
    config = copy.deepcopy(model.config)
    config.model.llm.lora_rank, config.model.llm.tokenizer = 0, "."
    config.model.llm.tied = config.model.llm.tied and not is_untied(config.model)
    config.model.trainable = [part for part in config.model.trainable if part not in MERGED_PARTS]
    config.model.weights = config.model.clip.weights = config.model.llm.weights = config.model.segmenter.weights = None
    tensors = merged_tensors(model, dtype or DTYPES[config.model.precision])
    save_model(folder, tensors, config, model.vocabulary, metadata={"source": source})


def save_model(
    folder: str | Path, tensors: Tensors, config: ModelFolderConfig, vocabulary: AnyVocabulary, metadata: dict[str, str]
) -> None:
    """Write a folder of a complete model: config, tokenizer, weights. It appears whole or not at all.

    Args:
        folder: must not exist.
        tensors: the whole state dict.
        config: what ``load_model`` builds from.
        vocabulary: its files are copied.
        metadata: strings kept in the weights file (where it comes from).

    Raises:
        OSError: it cannot be written, or is there.
    """
    with atomic_folder(Path(folder)) as temporary:
        write_model_config(temporary, config, vocabulary)
        write_shards(temporary, tensors, "safetensors", SHARD_BYTES, metadata)


def write_model_config(folder: Path, config: ModelFolderConfig, vocabulary: AnyVocabulary) -> None:
    """Write all of a model folder but its weights: what ``load_model`` builds from, and the tokenizer."""
    (folder / CONFIG_FILE).write_text(to_yaml(config))
    for name in vocabulary.files:
        shutil.copyfile(vocabulary.folder / name, folder / name)


def is_complete(folder: Path) -> bool:
    """Whether a model folder holds all tensors, not only those that were trained."""
    return any((folder / name).is_file() for name in (COMPLETE_FILE, f"{COMPLETE_FILE}.index.json"))


def find_model_folder(path: str | Path) -> Path:
    """The model folder that ``path`` is, or the newest checkpoint of the run folder that it is.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(path)
    found = [folder for folder in (*list_steps(path), path) if _is_model_folder(folder)]
    if not found:
        raise FileNotFoundError(
            f"weights={path}: neither a model folder ({CONFIG_FILE} and {COMPLETE_FILE} or {TRAINED_FILE}) nor a run "
            f"with checkpoints/{_instead_of_model(path)}"
        )
    # a run that goes on may point the link elsewhere while its files are read one after the other
    return found[-1].resolve() if found[-1].name == BEST_LINK else found[-1]


def _is_model_folder(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (is_complete(folder) or (folder / TRAINED_FILE).is_file())


def _instead_of_model(path: Path) -> str:
    """What a path is that is no model folder, for a message."""
    if path.is_file():
        return f": it is a file; give its folder, weights={path.parent}"
    if is_hub_id(path) or ((path / "config.json").is_file() and find_forms(path)):
        return f": published weights become one by python tools/convert_weights.py --weights {path} --output FOLDER"
    return instead_of_weights(path)


def list_steps(run: Path) -> list[Path]:
    """Checkpoints of a run, complete or not, the newest last. Other names in ``checkpoints/`` are not ours."""
    found = [path for path in run.glob("checkpoints/step_*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def load_model(
    path: str | Path,
    precision: Precision | None = None,
    settings: SettingsConfig | None = None,
    as_trained: bool = False,
    target: Target = IN_MEMORY,
) -> LoadedModel:
    """Build and strictly load a model folder (or the newest checkpoint of a run), in evaluation mode.

    Args:
        path: see ``find_model_folder``.
        precision: replaces the saved one; None keeps it.
        settings: override the folder's; each that changes something is logged.
        as_trained: whatever ``fuser_gamma`` says, keep the memory encoder's scales as the weights have them; for a
            model that is to be stored or trained on.
        target: where the weights go; default: the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights or config do not fit: they are not exactly the model's tensors (all of an export), or its
            trainable ones (of a checkpoint).
    """
    folder = find_model_folder(path)
    config = read_config(ModelFolderConfig, folder / CONFIG_FILE)
    config, changes = override_settings(config, settings or SettingsConfig())
    for change in changes:
        log.warning("%s: %s", path, change)
    if precision is not None:
        config.model.precision = precision
    config.model.llm.tokenizer = str(folder)
    gamma = FuserGamma.checkpoint if as_trained else config.model.segmenter.fuser_gamma
    model = replace(config.model, segmenter=replace(config.model.segmenter, fuser_gamma=gamma))
    if is_complete(folder):
        glus = assemble(model, is_clip_empty=True, is_llm_empty=True)
        target = quantize(glus, model, target)
        names = glus.state_dict().keys() - second_names(glus)
        load_into(glus, lambda: Source(folder, current_names(read_tensors(folder)), names), target)
    else:
        glus, file = build_glus(model, target=target), folder / TRAINED_FILE
        load_into(glus, lambda: Source(file, current_names(read_tensors(file)), trainable_names(glus)), target)
    complete(glus)
    return LoadedModel(glus.eval().to(target.device), open_vocabulary(folder), config)


def current_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Tensors of a model folder of ours, however old, under today's names."""
    return {replace_start(name, _FORMER) or name: value for name, value in tensors.items()}
