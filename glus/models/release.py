"""Checkpoints in the authors' layout: read one into our model, and our tensors under its names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glus.config import (
    FramesConfig,
    InferenceConfig,
    ModelConfig,
    ModelFolderConfig,
    Precision,
    SegHeadInit,
    SegmenterConfig,
)
from glus.models import key_map
from glus.models.build import LoadedModel, assemble, complete, load_parts, loaded_names, under_adapters
from glus.models.release_config import check_added_tokens, find_folder, read_clip_config, read_llm_config
from glus.models.weight_files import LazyTensor, Tensors
from glus.models.weights import LoadReport, Source, Target, load, read_clip_folder, read_tensors
from glus.tokens import Vocabulary

IOU_HEAD_PREFIX = "iou_head."
_CLIP_PREFIX = "mllm.clip.vision_model."


@dataclass
class ReleaseCheckpoint:
    """A published checkpoint that is read but not built; ``config`` may be changed before ``build_release``."""

    folder: Path
    """Its local folder."""
    config: ModelConfig
    """As the checkpoint is: no LoRA; float32 unless every tensor is bfloat16."""
    vocabulary: Vocabulary
    """Of the checkpoint's own tokenizer files."""
    tensors: dict[str, torch.Tensor]
    """Under our names, CLIP's among them."""
    dropped: dict[str, int]
    """What was left aside knowingly -> number of tensors."""
    unknown: tuple[str, ...]
    """Names in the checkpoint that stand for nothing; ``build_release`` refuses them."""
    hint: str
    """What kind of checkpoint it may be instead; empty: no idea."""


def read_release(
    source: str | Path, segmenter: SegmenterConfig | None = None, clip: str | None = None
) -> ReleaseCheckpoint:
    """Read a merged GLUS checkpoint.

    Args:
        source: its folder, or ``owner/name`` on Hugging Face.
        segmenter: which SAM2 it holds, since its files do not say; default: the published ``sam2_hiera_l``. Its
            ``weights`` are not read: the checkpoint brings its own.
        clip: folder or hub id of the CLIP; default: the ``vision_tower`` of its config.json.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or describes another kind of model.
    """
    folder = find_folder(source, "weights")
    vocabulary = Vocabulary(folder)
    config = _read_config(folder, vocabulary, segmenter or SegmenterConfig(), clip)
    tensors = read_tensors(folder)
    key_map.check_inv_freq(tensors, config.llm.architecture, folder)
    renamed = key_map.GLUS.rename(tensors)
    if all(value.dtype is torch.bfloat16 for value in renamed.tensors.values()):
        config.precision = Precision.bf16
    assert config.clip.weights is not None
    vision = read_clip_folder(config.clip.weights)
    return ReleaseCheckpoint(
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=renamed.tensors | {_CLIP_PREFIX + name: value for name, value in vision.items()},
        dropped=renamed.dropped,
        unknown=renamed.unknown,
        hint=key_map.glus_hint(tensors),
    )


def _read_config(folder: Path, vocabulary: Vocabulary, segmenter: SegmenterConfig, clip: str | None) -> ModelConfig:
    """What config.json and the tokenizer files say, which must agree."""
    llm = read_llm_config(folder)
    check_added_tokens(folder, vocabulary.added_tokens)
    if vocabulary.size > llm.vocab_size:
        raise ValueError(
            f"{folder}/added_tokens.json has id {vocabulary.size - 1}, but config.json says vocab_size={llm.vocab_size}"
        )
    config = ModelConfig(read_clip_config(folder, clip), llm, segmenter)
    config.trainable = [part for part in config.trainable if part != "lora"]
    return config


def load_lisa(
    source: str | Path,
    segmenter: SegmenterConfig,
    clip: str | None = None,
    seg_head_init: SegHeadInit = SegHeadInit.random,
    target: Target | None = None,
) -> tuple[LoadedModel, dict[str, LoadReport]]:
    """What GLUS starts to train from: LISA-7B-v1 for the LLM and the projector, SAM2 for the masks.

    Args:
        source: LISA's folder, or ``owner/name`` on Hugging Face.
        segmenter: SAM2 and, in ``weights``, its file.
        clip: folder or hub id of the CLIP; default: the ``vision_tower`` of its config.json.
        seg_head_init: whether LISA's [SEG] head is kept; the release starts it at random.
        target: where the weights go; default: the CPU.

    Returns:
        The model in float32, in evaluation mode, and what was loaded for which field of the config.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or its tensors are not exactly those of the model.
    """
    folder = find_folder(source, "weights")
    vocabulary = Vocabulary(folder)
    config = _read_config(folder, vocabulary, segmenter, clip)
    config.llm.weights = str(folder)
    config.seg_head_init = seg_head_init
    glus = assemble(config, is_clip_empty=True, is_llm_empty=True)
    reports = load_parts(glus, config, target)
    complete(glus, config, target or Target())
    return LoadedModel(glus.eval(), vocabulary, ModelFolderConfig(config)), reports


def build_release(
    checkpoint: ReleaseCheckpoint,
    frames: FramesConfig | None = None,
    inference: InferenceConfig | None = None,
    target: Target | None = None,
) -> tuple[LoadedModel, dict[str, LoadReport]]:
    """The model of a checkpoint, in evaluation mode, with fresh LoRA adapters if its config asks for them.

    Args:
        checkpoint: what ``read_release`` gave.
        frames: context and query counts, which the checkpoint does not say; default: the published ones.
        inference: likewise.
        target: where the weights go; default: the CPU.

    Returns:
        The model, and what was loaded of "checkpoint" and "CLIP", by the names in their files.

    Raises:
        ValueError: the tensors are not exactly those of the model; the message lists them by the checkpoint's names.
    """
    config, target = checkpoint.config, target or Target()
    glus = assemble(config, is_clip_empty=True, is_llm_empty=True)
    tensors, vision = dict[str, Any](), dict[str, Any]()
    for name, value in checkpoint.tensors.items():
        (vision if name.startswith(_CLIP_PREFIX) else tensors)[name] = value
    names = loaded_names(glus)
    source = Source(
        checkpoint.folder,
        tensors,
        [name for name in names if not name.startswith(_CLIP_PREFIX)],
        key_map.GLUS.label,
        checkpoint.dropped,
        checkpoint.unknown,
        checkpoint.hint,
    )
    reports = {"checkpoint": load(glus, lambda: under_adapters(glus, source), target)}
    names_of_clip = [name for name in names if name.startswith(_CLIP_PREFIX)]
    reports["CLIP"] = load(glus, lambda: Source(config.clip.weights or "CLIP", vision, names_of_clip), target)
    complete(glus, config, target)
    folder_config = ModelFolderConfig(config, frames or FramesConfig(), inference or InferenceConfig())
    return LoadedModel(glus.eval().to(target.device), checkpoint.vocabulary, folder_config), reports


def load_release(
    source: str | Path,
    segmenter: SegmenterConfig | None = None,
    clip: str | None = None,
    frames: FramesConfig | None = None,
    inference: InferenceConfig | None = None,
) -> LoadedModel:
    """``read_release`` and ``build_release`` in one: a merged GLUS checkpoint as a model, in evaluation mode."""
    return build_release(read_release(source, segmenter, clip), frames, inference)[0]


def to_release(tensors: Tensors, config: ModelConfig) -> dict[str, torch.Tensor | LazyTensor]:
    """Our tensors under the names of a merged GLUS checkpoint, which has no CLIP but a copy of ``inv_freq`` a layer.

    It has no place for an IoU head either, which masks do not depend on.

    Args:
        tensors: state dict of a ``Glus`` without LoRA adapters.
        config: it was built from.

    Raises:
        ValueError: a tensor has no place there.
    """
    release: dict[str, torch.Tensor | LazyTensor] = {}
    homeless = []
    for name, value in tensors.items():
        if name.startswith(IOU_HEAD_PREFIX):
            continue
        new = key_map.GLUS.in_file(name)
        if new is not None and ".lora_" not in name and ".base_layer." not in name:
            release[new] = value
        elif not name.startswith("mllm.clip."):
            homeless.append(name)
    if homeless:
        raise ValueError(
            f"{len(homeless)} tensors have no place in the released layout, such as {homeless[0]}; "
            "LoRA adapters must be merged first (tools/export.py)"
        )
    dtype = release["model.embed_tokens.weight"].dtype
    return release | key_map.inv_freq_tensors(config.llm.architecture, dtype)
