"""Checkpoints in the authors' layout: read one into our model, write ours as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from glus.config import (
    FramesConfig,
    FuserGamma,
    InferenceConfig,
    ModelConfig,
    ModelFolderConfig,
    Precision,
    SegmenterConfig,
)
from glus.models import key_map
from glus.models.build import LoadedModel, build_glus
from glus.models.language import plain_names
from glus.models.release_config import find_folder, read_clip_config, read_llm_config
from glus.models.weights import LoadReport, load_strict, read_clip_folder, read_tensors
from glus.tokens import Vocabulary

_CLIP_PREFIX = "clip.vision_model."


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
        segmenter: which SAM2 it holds, since its files do not say; default: the published ``sam2_hiera_l``.
        clip: folder or hub id of the CLIP; default: the ``vision_tower`` of its config.json.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or describes another kind of model.
    """
    folder = find_folder(source, "weights")
    vocabulary = Vocabulary(folder)
    llm = read_llm_config(folder)
    if vocabulary.size > llm.vocab_size:
        raise ValueError(
            f"{folder}/added_tokens.json has id {vocabulary.size - 1}, but config.json says vocab_size={llm.vocab_size}"
        )
    clip_config = read_clip_config(folder, clip)
    tensors = read_tensors(folder)
    key_map.check_inv_freq(tensors, llm.architecture, folder)
    renamed = key_map.GLUS.rename(tensors)
    assert clip_config.weights is not None
    vision = read_clip_folder(clip_config.weights)
    is_half = all(value.dtype is torch.bfloat16 for value in renamed.tensors.values())
    config = ModelConfig(clip_config, llm, segmenter or SegmenterConfig())
    config.precision = Precision.bf16 if is_half else Precision.fp32
    config.trainable = [part for part in config.trainable if part != "lora"]
    return ReleaseCheckpoint(
        folder=folder,
        config=config,
        vocabulary=vocabulary,
        tensors=renamed.tensors | {_CLIP_PREFIX + name: value for name, value in vision.items()},
        dropped=renamed.dropped,
        unknown=renamed.unknown,
        hint=key_map.glus_hint(tensors),
    )


def build_release(
    checkpoint: ReleaseCheckpoint, frames: FramesConfig | None = None, inference: InferenceConfig | None = None
) -> tuple[LoadedModel, LoadReport]:
    """The model of a checkpoint, in evaluation mode, with fresh LoRA adapters if its config asks for them.

    Args:
        checkpoint: what ``read_release`` gave.
        frames: context and query counts, which the checkpoint does not say; default: the published ones.
        inference: likewise.

    Returns:
        The model, and what was loaded under the checkpoint's names.

    Raises:
        ValueError: the tensors are not exactly those of the model; the message lists them by the checkpoint's names.
    """
    config = checkpoint.config
    glus = build_glus(config, load_weights=False)
    actual = plain_names(glus)
    plain = {name: before for before, name in actual.items()}
    report = load_strict(
        glus,
        {actual.get(name, name): value for name, value in checkpoint.tensors.items()},
        checkpoint.folder,
        only=actual.values(),
        label=lambda name: key_map.GLUS.label(plain.get(name, name)),
        dropped=checkpoint.dropped,
        unknown=checkpoint.unknown,
        hint=checkpoint.hint,
    )
    if config.segmenter.fuser_gamma is FuserGamma.identity:
        glus.segmenter.set_fuser_identity()  # again: the checkpoint brought the trained scales
    folder_config = ModelFolderConfig(config, frames or FramesConfig(), inference or InferenceConfig())
    return LoadedModel(glus.eval(), checkpoint.vocabulary, folder_config), report


def load_release(
    source: str | Path,
    segmenter: SegmenterConfig | None = None,
    clip: str | None = None,
    frames: FramesConfig | None = None,
    inference: InferenceConfig | None = None,
) -> LoadedModel:
    """``read_release`` and ``build_release`` in one: a merged GLUS checkpoint as a model, in evaluation mode."""
    return build_release(read_release(source, segmenter, clip), frames, inference)[0]
