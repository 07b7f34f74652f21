"""Write a model as a folder in the authors' layout, with its CLIP in a folder inside.

Not stored, as in the published checkpoints: K and Q, memory strides, which SAM2 it is. Fields of config.json are those
that the released GLUS writes under transformers 4.31.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from glus.config import FuserGamma, ModelConfig
from glus.files import atomic_folder
from glus.models.build import LoadedModel, merged_tensors
from glus.models.mllm.llava import CLIP_MEAN, CLIP_STD, ClipEncoder
from glus.models.release import IOU_HEAD_PREFIX, to_release
from glus.models.release_config import CLIP_FIELDS, LLM_FIELDS
from glus.models.weight_files import LazyTensor, Tensors, write_shards
from glus.tokens import Vocabulary

CLIP_FOLDER = "clip"
_POOL = 4
"""The released code pools four patches whatever its config says."""
_BICUBIC = 3
"""PIL's number of it."""


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
    state = {name: LazyTensor.of(value) for name, value in merged_tensors(model).items()}
    state = {name: value.to(dtype or value.dtype) for name, value in state.items()}
    release = to_release(state, config)
    clip = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
    with atomic_folder(folder) as temporary:
        (temporary / CLIP_FOLDER).mkdir()
        write_shards(temporary, release, "safetensors" if safetensors else "bin", shard_bytes, {"format": "pt"})
        _write_json(temporary / "config.json", _config_json(model, release))
        generation = {"_from_model_config": True, "use_cache": False, **_TOKEN_IDS}
        _write_json(temporary / "generation_config.json", generation)
        _write_tokenizer(temporary, model.vocabulary)
        _write_clip(temporary / CLIP_FOLDER, model.glus.clip, clip, safetensors)
    left_out = sum(name.startswith(IOU_HEAD_PREFIX) for name in state)
    notice = {"left out: tensors of the IoU head, for which the layout has no place": left_out} if left_out else {}
    return {"tensors of the checkpoint": len(release), "tensors of its CLIP": len(clip), **notice}


def _check_layout_holds(config: ModelConfig) -> None:
    """Raise for settings that the release's code has fixed to another value."""
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


def _write_clip(folder: Path, encoder: ClipEncoder, tensors: Tensors, safetensors: bool) -> None:
    """As transformers 4 reads it, in one file; ``tensors`` under its names, from ``vision_model.`` on."""
    write_shards(folder, tensors, "safetensors" if safetensors else "bin", sys.maxsize, {"format": "pt"})
    architecture = {key: getattr(encoder.vision_model.config, key) for key in CLIP_FIELDS}
    _write_json(
        folder / "config.json",
        {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **architecture},
    )
    side = encoder.image_size
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": _BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
    )


_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.31.0"}


def _config_json(model: LoadedModel, release: Tensors) -> dict[str, Any]:
    llama, encoder = model.glus.language.llama.config, model.glus.clip
    dtype = release["model.embed_tokens.weight"].dtype
    return {
        "architectures": ["GLUSForCausalLM"],
        "model_type": "llava",
        **_TOKEN_IDS,
        **{key: getattr(llama, key) for key in LLM_FIELDS},
        "vocab_size": llama.vocab_size,
        "initializer_range": llama.initializer_range,
        "rope_scaling": None,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_tower": CLIP_FOLDER,
        "mm_vision_tower": CLIP_FOLDER,
        "mm_hidden_size": encoder.width,
        "mm_vision_select_layer": encoder.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": True,
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


def _write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copyfile(vocabulary.folder / name, folder / name)
    texts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {name: {"content": text, **plain} for name, text in texts.items()}
    _write_json(folder / "special_tokens_map.json", {**tokens, "pad_token": "<unk>"})
    settings: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 512,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    typed = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()}
    _write_json(folder / "tokenizer_config.json", settings | typed)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
