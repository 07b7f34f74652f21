"""From config to network: the only place where a config meets a module, and the table of what is trained."""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf
from torch import nn

from glus import distributed
from glus.config import (
    FuserGamma,
    ModelConfig,
    ModelFolderConfig,
    Precision,
    Quantization,
    SegHeadInit,
    SegmenterConfig,
    SettingsConfig,
    load_config,
    override_settings,
    to_yaml,
)
from glus.files import atomic_folder
from glus.models import key_map
from glus.models.glus import Glus, IouHead, SegHead
from glus.models.mllm.adapters import NewRows, Quantizer, check_quantization, split_embeddings, split_head
from glus.models.mllm.llava import (
    ClipEncoder,
    LanguageModel,
    add_lora,
    build_llama,
    build_vision_tower,
    merged_weight,
    plain_names,
)
from glus.models.release_config import check_llm_config
from glus.models.segmenter.sam2 import Sam2Segmenter, build_sam2
from glus.models.weight_files import LazyTensor, Tensors, write_shards
from glus.models.weights import LoadReport, Source, Target, load, read_clip_folder, read_tensors
from glus.tokens import Vocabulary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

log = logging.getLogger(__name__)

PARTS: dict[str, tuple[str, ...]] = {
    "clip": ("clip.",),
    "projector": ("projector.",),
    "lora": (".lora_A.", ".lora_B."),
    "embeddings": ("language.llama.model.embed_tokens.",),
    "lm_head": ("language.llama.lm_head.",),
    "embeddings_new_rows": ("language.llama.model.embed_tokens.new_rows",),
    "lm_head_new_rows": ("language.llama.lm_head.new_rows",),
    "llm": ("language.llama.",),
    "seg_head": ("seg_head.",),
    "iou_head": ("iou_head.",),
    "mask_decoder": ("segmenter.sam.sam_mask_decoder.",),
    "image_encoder": ("segmenter.sam.image_encoder.",),
    "memory": ("segmenter.sam.memory_attention.", "segmenter.sam.memory_encoder.", "segmenter.sam.no_mem_embed"),
    "prompt_encoder": ("segmenter.sam.sam_prompt_encoder.",),
}
"""What ``model.trainable`` may name: part -> substrings of the parameter names it stands for."""

_DECODER = "segmenter.sam.sam_mask_decoder."
NEVER_UPDATED = (
    f"{_DECODER}conv_s0.",
    f"{_DECODER}conv_s1.",
    f"{_DECODER}iou_prediction_head.",
    f"{_DECODER}pred_obj_score_head.",
    *(f"{_DECODER}output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
)
"""Parameters of the mask decoder that are declared trainable, as released, yet never learn: the convolutions run with
the image encoder, under no_grad while that is frozen, and the other heads' outputs reach no loss. Without
``trainer.weight_decay`` (0, as released) they keep their values; with it they shrink, as what learns does."""

_SPLITS = (("embeddings_new_rows", "embeddings", split_embeddings), ("lm_head_new_rows", "lm_head", split_head))
"""Part of some rows, part of the whole table, and what sets the rows apart."""

PROJECTOR_STD = 0.01
RANDOM_STD = 0.02
"""LLaMA's own, of weights that are to be measured with."""
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
TRAINED_FILE = "trained.safetensors"
COMPLETE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""A complete model that is larger is written as shards with an index."""
CONFIG_FILE = "config.yaml"
UNQUANTIZED = SettingsConfig(llm_quantization=Quantization.none)
"""For a model that is merged: adapters go into the full-precision weights, also those trained over quantised ones."""


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory."""

    glus: Glus
    vocabulary: Vocabulary
    config: ModelFolderConfig


def build_glus(config: ModelConfig, load_weights: bool = True, target: Target | None = None) -> Glus:
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
    has_start, target = bool(config.weights), target or Target()
    glus = assemble(config, has_start or bool(config.clip.weights), has_start or bool(config.llm.weights))
    target = quantize(glus, config, target)
    random = [*_tensors_with_values(glus).values()]
    if config.weights:
        load_start(glus, config.weights, target)
    else:
        load_parts(glus, config, target)
    complete(glus, config, target)
    if not target.stays_on_disk:
        for tensor in random:  # those that are random still, though each rank drew them with the same seed
            distributed.broadcast(tensor)
    return glus.to(target.device)


def build_random(config: ModelConfig, device: torch.device) -> Glus:
    """The network with random weights, to measure it with; CLIP and LLM are drawn where they are to be and in their own
    precision, so that the device needs room for the network alone.

    Args:
        config: sizes, trainable parts; the files that it names are not read.
        device: of the network.
    """
    glus = assemble(config, is_clip_empty=True, is_llm_empty=True)
    for module in glus.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty_like(parameter, device=device)
                is_norm = parameter.dim() == 1 and name in ("weight", "bias")
                nn.init.constant_(value, name == "weight") if is_norm else nn.init.normal_(value, std=RANDOM_STD)
                setattr(module, name, nn.Parameter(value, parameter.requires_grad))
    complete(glus, config, Target(device))
    return glus.to(device)


def assemble(config: ModelConfig, is_clip_empty: bool = False, is_llm_empty: bool = False) -> Glus:
    """The network at random, its trained parts marked by ``requires_grad``.

    Args:
        config: sizes, trainable parts.
        is_clip_empty: CLIP is left without memory, on the meta device: it will be loaded, and completed.
        is_llm_empty: likewise the LLM, but for its adapters.

    Raises:
        ValueError: ``model.trainable`` names no part.
    """
    clip, llm = config.clip, config.llm
    # What is small and drawn at random comes first: so it is the same whether the large parts are drawn or loaded.
    segmenter = build_segmenter(config.segmenter, memory_gradient=not config.memory.detach)
    projector = nn.Linear(clip.architecture["hidden_size"], llm.architecture["hidden_size"])
    # CLIP features are tens of times longer than word embeddings; a projector that starts small keeps visual tokens
    # from drowning what the layers of an LLM that starts from nothing add to them. Loading replaces it.
    nn.init.normal_(projector.weight, std=PROJECTOR_STD)
    nn.init.zeros_(projector.bias)
    seg_head = SegHead(llm.architecture["hidden_size"], segmenter.width, config.seg_head_gain)
    with torch.device("meta") if is_clip_empty else nullcontext():
        tower = build_vision_tower(clip.architecture)
    with torch.device("meta") if is_llm_empty else nullcontext():
        llama = build_llama(llm.architecture, llm.vocab_size)
    glus = Glus(
        clip=ClipEncoder(tower, clip.select_layer, clip.pool),
        projector=projector,
        language=LanguageModel(llama),
        seg_head=seg_head,
        segmenter=segmenter,
        memory_frames=config.memory.num_frames,
        memory_stride=config.memory.stride,
        memory_enabled=config.memory.enabled,
    )
    if config.iou_head:
        with torch.random.fork_rng(devices=[]):  # so that all else starts as it would without
            glus.iou_head = IouHead(glus.language.width, glus.segmenter.width)
    if llm.lora_rank:
        add_lora(llama, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, llm.lora_targets)
        if is_llm_empty:
            _start_adapters(llama)
    split_new_rows(glus, config)
    if config.segmenter.fuser_gamma is FuserGamma.identity:
        glus.segmenter.set_fuser_identity()
    mark_trainable(glus, [*config.trainable, *(["iou_head"] if config.iou_head else [])])
    return glus.to(DTYPES[config.precision])


def _start_adapters(llama: LlamaForCausalLM) -> None:
    """Give adapters their first values, which peft puts on the meta device with the layers they adapt."""
    from peft.tuners.lora import LoraLayer

    for layer in llama.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                layer.lora_A[name].to_empty(device="cpu")
                layer.lora_B[name].to_empty(device="cpu")
                layer.reset_lora_parameters(name, init_lora_weights=True)


def _tensors_with_values(glus: Glus) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are not on the meta device."""
    tensors: dict[str, torch.Tensor] = {**dict(glus.named_parameters()), **dict(glus.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def complete(glus: Glus, config: ModelConfig, target: Target) -> None:
    """Give the last tensors their values, which come from no file but follow from what was loaded."""
    embeddings = glus.clip.vision_model.embeddings
    if embeddings.position_ids.is_meta:
        positions = torch.arange(embeddings.num_positions, device=target.device)
        embeddings.register_buffer("position_ids", positions.expand_as(embeddings.position_ids), persistent=False)
    for module in glus.language.llama.modules():
        if isinstance(module, NewRows) and module.new_rows.is_meta:
            module.reset()
    if config.segmenter.fuser_gamma is FuserGamma.identity:
        glus.segmenter.set_fuser_identity()  # again: the files brought the trained scales
    empty = [name for name, tensor in (*glus.named_parameters(), *glus.named_buffers()) if tensor.is_meta]
    assert not empty, f"without values: {empty[:5]}"


def quantize(glus: Glus, config: ModelConfig, target: Target) -> Target:
    """Make room for the LLM's projections in fewer bits where that is asked for, before they are loaded.

    Returns:
        Where weights go: these are quantised when they arrive.

    Raises:
        ValueError: they cannot be here, or they are trained.
    """
    quantization = config.llm.quantization
    if quantization is Quantization.none:
        return target
    check_quantization(quantization, distributed.device())
    return replace(target, pack=Quantizer(glus.language.llama, quantization, distributed.device()).pack)


def split_new_rows(glus: Glus, config: ModelConfig) -> None:
    """Where ``trainable`` names ``*_new_rows``, make the added tokens' rows of that table parameters of their own.

    Raises:
        ValueError: it names the whole table as well.
    """
    for part, whole, split in _SPLITS:
        if part in config.trainable:
            both = [name for name in (whole, "llm") if name in config.trainable]
            if both:
                raise ValueError(f"model.trainable names {both[0]!r} and {part!r}, which is a part of it: drop one")
            split(glus.language.llama, sorted(Vocabulary(config.llm.tokenizer).added_tokens.values()))


def build_segmenter(config: SegmenterConfig, memory_gradient: bool = False) -> Sam2Segmenter:
    """SAM2 at random, to be loaded or pre-trained."""
    return Sam2Segmenter(build_sam2(config.variant, config.overrides), config.multimask_fallback, memory_gradient)


def load_start(glus: Glus, folder: str, target: Target) -> None:
    """Load all weights of another model, its adapters merged and its memory encoder as trained.

    Either may have an IoU head alone: this one's is then at random, or the other's left aside.

    Raises:
        FileNotFoundError: ``folder`` is no model folder and no run.
        ValueError: its tensors are not exactly these.
    """

    def read() -> Source:
        start = load_model(folder, settings=UNQUANTIZED, as_trained=True, target=Target(stays_on_disk=True))
        tensors = merged_tensors(start, widens=not target.stays_on_disk)
        if glus.iou_head is None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("iou_head.")}
        only = [name for name in loaded_names(glus) if start.glus.iou_head or not name.startswith("iou_head.")]
        return under_adapters(glus, Source(folder, tensors, only))

    load(glus, read, target)


def loaded_names(glus: Glus) -> list[str]:
    """Names of the tensors that another model has too, as they are without adapters."""
    return [name for name in plain_names(glus) if not name.endswith(".new_rows")]


def under_adapters(glus: Glus, source: Source) -> Source:
    """Weights of a model without adapters for one that may have them."""
    actual = plain_names(glus)
    plain = {now: before for before, now in actual.items()}
    return replace(
        source,
        tensors={actual.get(name, name): tensor for name, tensor in source.tensors.items()},
        only=[actual[name] for name in source.only or loaded_names(glus)],
        label=lambda name: source.label(plain.get(name, name)),
    )


def merged_tensors(model: LoadedModel, widens: bool = True) -> dict[str, torch.Tensor | LazyTensor]:
    """The state dict with adapters and new rows merged, in the model's precision, each tensor made when it is read.

    Args:
        model: on disk or in memory.
        widens: False leaves what merging does not change in its narrower type, which takes no memory.

    Raises:
        ValueError: a weight is quantised; its steps are coarser than what adapters learn.
    """
    from peft.tuners.lora import LoraLayer

    glus, dtype = model.glus, DTYPES[model.config.model.precision]
    adapters = {f"{name}.": module for name, module in glus.named_modules() if isinstance(module, LoraLayer)}
    tables = {f"{name}.weight": module for name, module in glus.named_modules() if isinstance(module, NewRows)}
    merged: dict[str, torch.Tensor | LazyTensor] = {}
    for name, value in glus.state_dict().items():
        if ".lora_" in name or name.endswith(".new_rows"):
            continue
        adapted, base, _ = name.partition("base_layer.")
        if not value.is_floating_point():
            raise ValueError(f"{name} is quantised: load the model unquantised, then merge")
        is_exact = torch.promote_types(value.dtype, dtype) is dtype
        is_merged = bool(base) or name in tables
        tensor = LazyTensor.of(value)
        if widens or is_merged or not is_exact:
            tensor = tensor.to(dtype)
        if name in tables:
            tensor = tensor.map(tables[name].with_rows)
        if base and name.endswith(".weight"):
            tensor = tensor.map(partial(merged_weight, adapters[adapted]))
        merged[adapted + name.removeprefix(adapted + base)] = tensor
    return merged


def load_parts(glus: Glus, config: ModelConfig, target: Target | None = None) -> dict[str, LoadReport]:
    """Load the pretrained towers the config names, each strictly.

    Returns:
        Name of the config's field -> what was loaded, under the file's names.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: weights do not fit, or ``model.seg_head_init`` asks for a head without ``model.llm.weights``.
    """
    reports, target = {}, target or Target()
    if clip := config.clip.weights:
        reports["model.clip.weights"] = load(
            glus.clip.vision_model, lambda: Source(clip, dict(read_clip_folder(clip))), target
        )
    if config.segmenter.weights:
        reports["model.segmenter.weights"] = load(glus, lambda: _segmenter_source(glus, config), target)
    if config.llm.weights:
        reports["model.llm.weights"] = load(glus, lambda: _language_source(glus, config), target)
    elif config.seg_head_init is SegHeadInit.lisa:
        raise ValueError("model.seg_head_init=lisa: set model.llm.weights to the folder of LISA-7B-v1, which holds it")
    return reports


def _segmenter_source(glus: Glus, config: ModelConfig) -> Source:
    assert config.segmenter.weights is not None
    renamed = key_map.SAM2.rename(read_tensors(config.segmenter.weights))
    names = [name for name in glus.state_dict() if name.startswith("segmenter.sam.")]
    return Source(config.segmenter.weights, dict(renamed.tensors), names, key_map.SAM2.label)


def _language_source(glus: Glus, config: ModelConfig) -> Source:
    """The LLM, and the projector where the file holds LLaVA's, and the [SEG] head if ``seg_head_init`` says so.

    LISA-7B-v1 is such a file: all rows of GLUS's tokens are in it, so none is added; its SAM-1 is left aside.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is of another LLM.
    """
    place = config.llm.weights
    assert place is not None
    keys = key_map.lisa(config.seg_head_init)
    check_llm_config(Path(place), config)
    tensors = read_tensors(place)
    key_map.check_inv_freq(tensors, config.llm.architecture, place)
    renamed = keys.rename(tensors)
    parts = ["language.llama."]
    parts += ["projector."] if any(name.startswith("projector.") for name in renamed.tensors) else []
    parts += ["seg_head."] if config.seg_head_init is SegHeadInit.lisa else []
    names = [name for name in loaded_names(glus) if name.startswith(tuple(parts))]
    hint = key_map.lisa_hint(renamed)
    source = Source(place, dict(renamed.tensors), names, keys.label, renamed.dropped, renamed.unknown, hint)
    return under_adapters(glus, source)


def mark_trainable(glus: Glus, parts: list[str]) -> None:
    """Set ``requires_grad`` of every parameter: True where a part of ``parts`` contains it, else False.

    Raises:
        ValueError: a part is unknown, or matches no parameter.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"model.trainable: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    names = dict(glus.named_parameters())
    for part in parts:
        if not any(key in name for name in names for key in PARTS[part]):
            raise ValueError(f"model.trainable: {part!r} matches no parameter (is model.llm.lora_rank 0?)")
    keys = [key for part in parts for key in PARTS[part]]
    for name, parameter in names.items():
        parameter.requires_grad_(any(key in name for key in keys))
    glus.note_trained()


def trainable_names(glus: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in glus.named_parameters() if parameter.requires_grad]


def save_model(
    folder: str | Path,
    tensors: Tensors,
    config: ModelFolderConfig,
    vocabulary: Vocabulary,
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder of a complete model: config, tokenizer, weights. It appears whole or not at all.

    Args:
        folder: must not exist.
        tensors: the whole state dict.
        config: what ``load_model`` builds from.
        vocabulary: its files are copied.
        metadata: strings kept in the weights file (where it comes from).
        shard_bytes: size of a file at most.

    Raises:
        OSError: it cannot be written, or is there.
    """
    with atomic_folder(Path(folder)) as temporary:
        write_model_config(temporary, config, vocabulary)
        write_shards(temporary, tensors, "safetensors", shard_bytes, metadata)


def write_model_config(folder: Path, config: ModelFolderConfig, vocabulary: Vocabulary) -> None:
    """Write all of a model folder but its weights: what ``load_model`` builds from, and the tokenizer."""
    (folder / CONFIG_FILE).write_text(to_yaml(config))
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copyfile(vocabulary.folder / name, folder / name)


def is_complete(folder: Path) -> bool:
    """Whether a model folder holds all tensors, not only those that were trained."""
    return (folder / COMPLETE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def find_model_folder(path: str | Path) -> Path:
    """The model folder that ``path`` is, or the newest checkpoint of the run folder that it is.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(path)
    if is_complete(path) or (path / TRAINED_FILE).is_file():
        return path
    checkpoints = [p for p in path.glob("checkpoints/step_*") if p.suffix != ".tmp"]
    if not checkpoints:
        raise FileNotFoundError(
            f"weights={path}: neither a model folder ({COMPLETE_FILE} or {TRAINED_FILE}) nor a run with checkpoints/"
        )
    return max(checkpoints, key=lambda p: int(p.name.removeprefix("step_")))


def load_model(
    path: str | Path,
    precision: Precision | None = None,
    settings: SettingsConfig | None = None,
    as_trained: bool = False,
    target: Target | None = None,
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
    folder, target = find_model_folder(path), target or Target()
    config = load_config(ModelFolderConfig, OmegaConf.load(folder / CONFIG_FILE))  # type: ignore[arg-type]
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
        load(glus, lambda: Source(folder, dict(read_tensors(folder))), target)
    else:
        glus, file = build_glus(model, target=target), folder / TRAINED_FILE
        load(glus, lambda: Source(file, dict(read_tensors(file)), trainable_names(glus)), target)
    complete(glus, model, target)
    return LoadedModel(glus.eval().to(target.device), Vocabulary(folder), config)
