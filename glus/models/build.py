"""From config to network: the only place where a config meets a module, and the table of what is trained."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from glus import distributed
from glus.atomic import whole_folder
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
from glus.models import key_map
from glus.models.clip import ClipEncoder, build_vision_tower
from glus.models.glus import Glus, IouHead, SegHead
from glus.models.language import LanguageModel, add_lora, build_llama, merge_lora
from glus.models.new_rows import merge_new_rows, split_embeddings, split_head
from glus.models.quantization import check_quantization, quantize_llama
from glus.models.release_config import check_llm_config
from glus.models.sam2 import Sam2Segmenter, build_sam2
from glus.models.weight_files import write_shards, write_tensors
from glus.models.weights import LoadReport, load_strict, read_clip_folder, read_tensors
from glus.tokens import Vocabulary

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
_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
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


def build_glus(config: ModelConfig, load_weights: bool = True) -> Glus:
    """The network, with the weights the config names, its trained parts marked by ``requires_grad``.

    Args:
        config: sizes, weights, trainable parts.
        load_weights: False leaves everything at random and unquantised (a complete model file follows, or the meta
            device).

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: weights do not fit, or ``model.trainable`` names no part.
    """
    if load_weights and config.llm.quantization is not Quantization.none:  # before minutes of loading
        check_quantization(config.llm.quantization, distributed.device())
    glus = Glus(
        clip=ClipEncoder(build_vision_tower(config.clip.architecture), config.clip.select_layer, config.clip.pool),
        projector=nn.Linear(config.clip.architecture["hidden_size"], config.llm.architecture["hidden_size"]),
        language=LanguageModel(build_llama(config.llm.architecture, config.llm.vocab_size)),
        seg_head=nn.Identity(),  # type: ignore[arg-type]  # needs SAM2's width, set below
        segmenter=build_segmenter(config.segmenter, memory_gradient=not config.memory.detach),
        memory_frames=config.memory.num_frames,
        memory_stride=config.memory.stride,
        memory_enabled=config.memory.enabled,
    )
    # CLIP features are tens of times longer than word embeddings; a projector that starts small keeps visual tokens
    # from drowning what the layers of an LLM that starts from nothing add to them. Loading replaces it.
    nn.init.normal_(glus.projector.weight, std=PROJECTOR_STD)
    nn.init.zeros_(glus.projector.bias)
    glus.seg_head = SegHead(glus.language.width, glus.segmenter.width, config.seg_head_gain)
    if config.iou_head:
        with torch.random.fork_rng(devices=[]):  # so that all else starts as it would without
            glus.iou_head = IouHead(glus.language.width, glus.segmenter.width)
    if load_weights and config.weights:
        load_start(glus, config.weights)
    elif load_weights:
        load_parts(glus, config)
    if config.llm.lora_rank:
        llm = config.llm
        add_lora(glus.language.llama, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, llm.lora_targets)
    split_new_rows(glus, config)
    if config.segmenter.fuser_gamma is FuserGamma.identity:
        glus.segmenter.set_fuser_identity()
    mark_trainable(glus, [*config.trainable, *(["iou_head"] if config.iou_head else [])])
    glus = glus.to(_DTYPES[config.precision])
    return quantize(glus, config.llm.quantization) if load_weights else glus


def quantize(glus: Glus, quantization: Quantization) -> Glus:
    """The same network, its LLM's projections stored in fewer bits on this process's GPU where that is asked for.

    Raises:
        ValueError: they cannot be here, or they are trained.
    """
    if quantization is not Quantization.none:
        check_quantization(quantization, distributed.device())
        quantize_llama(glus.language.llama, quantization, distributed.device())
    return glus


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


def load_start(glus: Glus, folder: str) -> None:
    """Load all weights of another model, its adapters merged and its memory encoder as trained.

    Either may have an IoU head alone: this one's is then at random, or the other's left aside.

    Raises:
        FileNotFoundError: ``folder`` is no model folder and no run.
        ValueError: its tensors are not exactly these.
    """
    start = load_model(folder, settings=UNQUANTIZED, as_trained=True).glus
    merge_lora(start.language.llama)
    merge_new_rows(start.language.llama)
    if start.iou_head is None or glus.iou_head is None:
        start.iou_head = glus.iou_head
    load_strict(glus, start.state_dict(), folder)


def load_parts(glus: Glus, config: ModelConfig) -> dict[str, LoadReport]:
    """Load the pretrained towers the config names, each strictly.

    Returns:
        Name of the config's field -> what was loaded, under the file's names.

    Raises:
        FileNotFoundError: a weights file is missing.
        ValueError: weights do not fit, or ``model.seg_head_init`` asks for a head without ``model.llm.weights``.
    """
    reports = {}
    if config.clip.weights:
        vision = read_clip_folder(config.clip.weights)
        reports["model.clip.weights"] = load_strict(glus.clip.vision_model, vision, config.clip.weights)
    if config.segmenter.weights:
        names = [name for name in glus.state_dict() if name.startswith("segmenter.sam.")]
        renamed = key_map.SAM2.rename(read_tensors(config.segmenter.weights))
        reports["model.segmenter.weights"] = load_strict(
            glus, renamed.tensors, config.segmenter.weights, names, key_map.SAM2.label
        )
    if config.llm.weights:
        reports["model.llm.weights"] = load_language(glus, config)
    elif config.seg_head_init is SegHeadInit.lisa:
        raise ValueError("model.seg_head_init=lisa: set model.llm.weights to the folder of LISA-7B-v1, which holds it")
    return reports


def load_language(glus: Glus, config: ModelConfig) -> LoadReport:
    """Load the LLM, and the projector where the file holds LLaVA's, and the [SEG] head if ``seg_head_init`` says so.

    LISA-7B-v1 is such a file: all rows of GLUS's tokens are in it, so none is added; its SAM-1 is left aside.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the tensors are not exactly these.
    """
    source = config.llm.weights
    assert source is not None
    keys = key_map.lisa(config.seg_head_init)
    check_llm_config(Path(source), config)
    tensors = read_tensors(source)
    key_map.check_inv_freq(tensors, config.llm.architecture, source)
    renamed = keys.rename(tensors)
    parts = ["language.llama."]
    parts += ["projector."] if any(name.startswith("projector.") for name in renamed.tensors) else []
    parts += ["seg_head."] if config.seg_head_init is SegHeadInit.lisa else []
    names = [name for name in glus.state_dict() if name.startswith(tuple(parts))]
    return load_strict(
        glus, renamed.tensors, source, names, keys.label, renamed.dropped, renamed.unknown, key_map.lisa_hint(renamed)
    )


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
    tensors: dict[str, torch.Tensor],
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
    with whole_folder(Path(folder)) as temporary:
        write_model_config(temporary, config, vocabulary)
        if sum(value.nbytes for value in tensors.values()) > shard_bytes:
            write_shards(temporary, tensors, "safetensors", shard_bytes, metadata)
        else:
            write_tensors(temporary / COMPLETE_FILE, tensors, metadata)


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


def load_folder(glus: Glus, folder: Path) -> None:
    """Load a model folder's weights into a model that is built: all tensors of an export, the trained of a checkpoint.

    Raises:
        ValueError: they are not exactly the model's tensors (export) or its trainable ones (checkpoint).
    """
    if is_complete(folder):
        load_strict(glus, read_tensors(folder), folder)
    else:
        load_strict(glus, read_tensors(folder / TRAINED_FILE), folder / TRAINED_FILE, only=trainable_names(glus))


def load_model(
    path: str | Path,
    precision: Precision | None = None,
    settings: SettingsConfig | None = None,
    as_trained: bool = False,
) -> LoadedModel:
    """Build and strictly load a model folder (or the newest checkpoint of a run), in evaluation mode.

    Args:
        path: see ``find_model_folder``.
        precision: replaces the saved one; None keeps it.
        settings: override the folder's; each that changes something is logged.
        as_trained: whatever ``fuser_gamma`` says, keep the memory encoder's scales as the weights have them; for a
            model that is to be stored or trained on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights or config do not fit.
    """
    folder = find_model_folder(path)
    config = load_config(ModelFolderConfig, OmegaConf.load(folder / CONFIG_FILE))  # type: ignore[arg-type]
    config, changes = override_settings(config, settings or SettingsConfig())
    for change in changes:
        log.warning("%s: %s", path, change)
    if precision is not None:
        config.model.precision = precision
    config.model.llm.tokenizer = str(folder)
    gamma = FuserGamma.checkpoint if as_trained else config.model.segmenter.fuser_gamma
    segmenter = replace(config.model.segmenter, fuser_gamma=gamma)
    glus = build_glus(replace(config.model, segmenter=segmenter), not is_complete(folder))
    load_folder(glus, folder)
    if is_complete(folder):  # its weights are loaded only now
        quantize(glus, config.model.llm.quantization)
    if gamma is FuserGamma.identity:
        glus.segmenter.set_fuser_identity()  # again: a complete file brings the trained scales back
    return LoadedModel(glus.eval(), Vocabulary(folder), config)
