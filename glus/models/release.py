"""Checkpoints in the authors' layout, in and out.

Not stored in them, as published: K and Q, memory strides, which SAM2 it is. Fields of config.json are those that the
released GLUS writes under transformers 4.31; the CLIP lies in a folder inside.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glus.config import (
    FuserGamma,
    ModelConfig,
    ModelFolderConfig,
    Precision,
    SegHeadInit,
    SegmenterConfig,
    SegState,
)
from glus.files import atomic_folder
from glus.models.build import DTYPES, assemble, complete
from glus.models.pretrained import (
    CONFIG_FILE,
    IOU_HEAD,
    LoadedModel,
    load_parts,
    loaded_names,
    merged_tensors,
    under_adapters,
)
from glus.models.release_layout import (
    CLIP_FIELDS,
    FIXED_FIELDS,
    GLUS_KEYS,
    LLM_FIELDS,
    check_added_tokens,
    check_inv_freq,
    find_folder,
    inv_freq_tensors,
    read_clip_config,
    read_llm_config,
)
from glus.models.weight_files import LazyTensor, Tensors, write_shards
from glus.models.weights import IN_MEMORY, LoadReport, Source, Target, load_into, read_tensors
from glus.tokens import Vocabulary

CLIP_FOLDER = "clip"
_POOL = 4
"""The released code pools four patches whatever its config says."""
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.31.0"}


@dataclass
class ReleaseCheckpoint:
    """A published checkpoint that is read but not built; ``config`` may be changed before ``build_release``."""

    config: ModelConfig
    """As the checkpoint is: no LoRA; bfloat16 if its LLM is, else float32."""
    vocabulary: Vocabulary
    """Of the checkpoint's own tokenizer files."""
    source: Source | None
    """All tensors of a merged GLUS but CLIP's; None: they are where ``config`` says."""


def read_release(
    source: str | Path,
    segmenter: SegmenterConfig,
    clip: str | None = None,
    seg_head_init: SegHeadInit = SegHeadInit.random,
) -> ReleaseCheckpoint:
    """Read a merged GLUS checkpoint, or what GLUS starts to train from: LISA-7B-v1, which needs SAM2's file beside it.

    Args:
        source: its folder, or ``owner/name`` on Hugging Face.
        segmenter: which SAM2 a merged GLUS holds, since its files do not say; with ``weights``, the source is LISA.
        clip: folder or hub id of the CLIP; default: the ``vision_tower`` of its config.json.
        seg_head_init: whether LISA's [SEG] head is kept; the release starts it at random.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or describes another kind of model.
    """
    folder = find_folder(source, "weights")
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is a run or model folder of GLUS, which is used as it is (the way back: --to-release)"
        )
    tensors = read_tensors(folder)  # before the tokenizer, which adapters or shards lack too
    vocabulary, llm = Vocabulary(folder), read_llm_config(folder)
    check_added_tokens(folder, vocabulary.added_tokens)
    if vocabulary.size > llm.vocab_size:
        raise ValueError(
            f"{folder}/added_tokens.json has id {vocabulary.size - 1}, but config.json says vocab_size={llm.vocab_size}"
        )
    config = ModelConfig(read_clip_config(folder, clip), llm, segmenter)
    config.trainable = [part for part in config.trainable if part != "lora"]
    if segmenter.weights:
        config.llm.weights, config.seg_head_init = str(folder), seg_head_init
        return ReleaseCheckpoint(config, vocabulary, None)
    check_inv_freq(tensors, config.llm.architecture, folder)
    checkpoint = GLUS_KEYS.source(folder, tensors)
    # Parts that LISA's program adds behind the LLM may be stored in float32; what was evaluated is all of one type.
    heads = (value.dtype for name, value in checkpoint.tensors.items() if name.endswith("lm_head.weight"))
    if torch.bfloat16 in heads:
        config.precision = Precision.bf16
    return ReleaseCheckpoint(config, vocabulary, checkpoint)


def build_release(
    checkpoint: ReleaseCheckpoint, target: Target = IN_MEMORY
) -> tuple[LoadedModel, dict[str, LoadReport]]:
    """The model of a checkpoint, in evaluation mode, with fresh LoRA adapters if its config asks for them.

    Args:
        checkpoint: what ``read_release`` gave. It does not say context and query counts, nor memory strides: those of
            the model are the published ones.
        target: where the weights go.

    Returns:
        The model, and what was loaded of the "checkpoint" and for fields of the config, by the names in their files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the tensors are not exactly those of the model; the message lists them by the checkpoint's names.
    """
    config, source, reports = checkpoint.config, checkpoint.source, dict[str, LoadReport]()
    glus = assemble(config, is_clip_empty=True, is_llm_empty=True)
    if source is not None:
        names = [name for name in loaded_names(glus) if not name.startswith("mllm.clip.")]
        whole = replace(source, only=names)
        reports["checkpoint"] = load_into(glus, lambda: under_adapters(glus, whole), target)
    reports |= load_parts(glus, config, target)
    complete(glus)
    return LoadedModel(glus.eval().to(target.device), checkpoint.vocabulary, ModelFolderConfig(config)), reports


def to_release(tensors: Tensors, config: ModelConfig) -> dict[str, torch.Tensor | LazyTensor]:
    """Our tensors under the names of a merged GLUS checkpoint, which has no CLIP but a copy of ``inv_freq`` a layer.

    It has no place for an IoU head either, which masks do not depend on.

    Args:
        tensors: state dict of a ``Glus`` without LoRA adapters.
        config: it was built from.

    Raises:
        ValueError: a tensor has no place there.
    """
    names = {name: GLUS_KEYS.in_file(name) for name in tensors if not name.startswith(("mllm.clip.", IOU_HEAD))}
    homeless = [name for name, new in names.items() if new is None or ".lora_" in name or ".base_layer." in name]
    if homeless:
        raise ValueError(
            f"{len(homeless)} tensors have no place in the released layout, such as {homeless[0]}; "
            "LoRA adapters must be merged first (tools/export.py)"
        )
    release = {new: tensors[name] for name, new in names.items() if new is not None}
    return release | inv_freq_tensors(config.llm.architecture, release["model.embed_tokens.weight"].dtype)


def save_release(
    folder: Path, model: LoadedModel, dtype: torch.dtype | None, safetensors: bool, shard_bytes: int
) -> dict[str, int]:
    """Write the folder. It appears whole or not at all.

    Args:
        folder: must not exist.
        model: its LoRA adapters and new rows, if any, are merged.
        dtype: of the stored weights; None keeps the model's.
        safetensors: shards are safetensors files, else pickles (``.bin``), as published.
        shard_bytes: size that a shard does not exceed, unless by a single tensor.

    Returns:
        What was written -> number of tensors.

    Raises:
        OSError: it cannot be written, or is there.
        ValueError: the layout cannot hold this model.
    """
    config = model.config.model
    _check_layout_holds(config)
    state = merged_tensors(model, dtype or DTYPES[config.precision])
    release = to_release(state, config)
    clip = {name.removeprefix("mllm.clip."): value for name, value in state.items() if name.startswith("mllm.clip.")}
    ending, metadata = "safetensors" if safetensors else "bin", {"format": "pt"}
    texts = {"config.json": _config_json(config, release), **_tokenizer_json(), **_clip_json(config)}
    texts["generation_config.json"] = {"_from_model_config": True, "use_cache": False, **_TOKEN_IDS}
    with atomic_folder(folder) as temporary:
        (temporary / CLIP_FOLDER).mkdir()
        write_shards(temporary, release, ending, shard_bytes, metadata)
        write_shards(temporary / CLIP_FOLDER, clip, ending, sys.maxsize, metadata)
        for name, content in texts.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        for name in Vocabulary.files:
            shutil.copyfile(model.vocabulary.folder / name, temporary / name)
    left_out = sum(name.startswith(IOU_HEAD) for name in state)
    notice = {"left out: tensors of the IoU head, for which the layout has no place": left_out} if left_out else {}
    return {"tensors of the checkpoint": len(release), "tensors of its CLIP": len(clip), **notice}


def _check_layout_holds(config: ModelConfig) -> None:
    """Raise for settings that the release's code has fixed to another value."""
    for key, fixed in (("family", "llava"), ("seg_state", SegState.predicting), ("seg_prompts", 1)):
        if getattr(config, key) != fixed:
            raise ValueError(f"model.{key}={getattr(config, key)}: the released layout has no such model")
    foreign = sorted(config.llm.architecture.keys() - {*LLM_FIELDS, "initializer_range"})
    if foreign:
        raise ValueError(f"model.llm.architecture.{foreign[0]}: the released layout has no such field")
    if config.clip.pool != _POOL:
        raise ValueError(f"model.clip.pool={config.clip.pool}: the released code always pools {_POOL} patches")
    if config.segmenter.fuser_gamma is FuserGamma.identity:
        raise ValueError(
            "model.segmenter.fuser_gamma=identity has replaced the trained scales of the memory encoder; "
            "set it to checkpoint in the model folder's config.yaml to write those"
        )


def _config_json(config: ModelConfig, release: Tensors) -> dict[str, Any]:
    from transformers import LlamaConfig

    llama = LlamaConfig(**config.llm.architecture)
    return {
        "architectures": ["GLUSForCausalLM"],
        "model_type": "llava",
        **_TOKEN_IDS,
        **{key: getattr(llama, key) for key in (*LLM_FIELDS, "initializer_range")},
        **FIXED_FIELDS,
        "rope_scaling": None,
        "vocab_size": config.llm.vocab_size,
        "pretraining_tp": 1,
        "use_cache": False,
        "torch_dtype": str(release["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "vision_tower": CLIP_FOLDER,
        "mm_vision_tower": CLIP_FOLDER,
        "mm_hidden_size": config.clip.architecture["hidden_size"],
        "mm_vision_select_layer": config.clip.select_layer,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": True,
        "pretrain_mm_mlp_adapter": None,
        "use_mm_proj": True,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "train_mask_decoder": True,
        "out_dim": release["model.text_hidden_fcs.0.2.weight"].shape[0],
        "mask_threshold": 0.0,
        "max_hole_area": 0.0,
        "max_sprinkle_area": 0.0,
    }


def _clip_json(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """As transformers 4 reads it."""
    from transformers import CLIPVisionConfig

    clip = CLIPVisionConfig(**config.clip.architecture)
    sizes = {key: getattr(clip, key) for key in CLIP_FIELDS}
    model = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **sizes}
    preprocessor = {  # all else is as the class has it by itself
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": clip.image_size},
        "crop_size": {"height": clip.image_size, "width": clip.image_size},
    }
    return {f"{CLIP_FOLDER}/config.json": model, f"{CLIP_FOLDER}/preprocessor_config.json": preprocessor}


def _tokenizer_json() -> dict[str, dict[str, Any]]:
    texts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {name: {"content": text, **plain} for name, text in texts.items()}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 512,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: {"__type": "AddedToken", **token} for name, token in tokens.items()},
    }
    return {"special_tokens_map.json": {**tokens, "pad_token": "<unk>"}, "tokenizer_config.json": settings}
