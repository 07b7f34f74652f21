"""What a published checkpoint says beside its tensors: config.json, its CLIP, and where both lie.

No class of transformers looks at these folders: their ``model_type`` is "llava", which names another model there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from glus.config import ClipConfig, LlmConfig, ModelConfig
from glus.files import read_object

Value = TypeVar("Value", int, float, str)

_LLM_INTEGERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_CLIP_INTEGERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_CLIP_OPTIONAL = ("projection_dim", "hidden_act", "layer_norm_eps")
"""Where a file does not state them, transformers' defaults are OpenAI's values."""
LLM_FIELDS = (*_LLM_INTEGERS, "num_key_value_heads", "hidden_act", "rms_norm_eps")
CLIP_FIELDS = (*_CLIP_INTEGERS, *_CLIP_OPTIONAL)
"""What our configs take over of a checkpoint's."""
_EXPECTED: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "rope_theta": 10000,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": True,
}
"""What our model is; a checkpoint that states another value is another model."""
_DOWNLOADED = ["*.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
"""Data only; never code."""
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_folder(name: str | Path, what: str) -> Path:
    """A local folder, or the local copy of a Hugging Face repository, which is downloaded if need be.

    Args:
        name: path of a folder, or ``owner/name``; the latter counts as a path too where a folder ``owner`` is here.
        what: how messages call it.

    Raises:
        FileNotFoundError: no such folder, or the download failed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(str(name)) or path.parent.is_dir():
        raise FileNotFoundError(f"{what}={name}: no such folder (expected a folder, or owner/name on Hugging Face)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{what}={name}: no such folder, and its download from Hugging Face failed: {error}"
        ) from error


def check_added_tokens(folder: Path, added: Mapping[str, int]) -> None:
    """That tokenizer_config.json, where a newer transformers lists the added tokens once more, says the same.

    Args:
        folder: of the checkpoint.
        added: token -> id, by added_tokens.json.

    Raises:
        ValueError: it gives a token another id, or an id another token.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    names = {number: token for token, number in added.items()}
    for number, entry in read_object(file).get("added_tokens_decoder", {}).items():
        token = entry["content"]
        if added.get(token, int(number)) != int(number) or names.get(int(number), token) != token:
            raise ValueError(f"{file} gives {token} the id {number}, but added_tokens.json says {dict(added)}")


def _value(content: dict[str, Any], key: str, kind: type[Value], file: Path) -> Value:
    """A field of the right type; whole numbers count as float too, True not as a number."""
    value = content.get(key)
    if kind is float and type(value) is int:
        return kind(value)
    if type(value) is not kind:
        raise ValueError(f"{file}: {key}={json.dumps(value)}, expected {kind.__name__}")
    return value


def read_llm_config(folder: Path) -> LlmConfig:
    """Sizes of the LLM by a checkpoint's config.json, without LoRA; its tokenizer lies in the same folder.

    Raises:
        FileNotFoundError, ValueError: the file is missing, lacks a field, or describes another kind of model.
    """
    file = folder / "config.json"
    content = read_object(file)
    for key, expected in _EXPECTED.items():
        if key in content and content[key] != expected:
            raise ValueError(f"{file}: {key}={json.dumps(content[key])}, but only {json.dumps(expected)} is supported")
    architecture: dict[str, Any] = {key: _value(content, key, int, file) for key in _LLM_INTEGERS}
    groups = "num_key_value_heads" if "num_key_value_heads" in content else "num_attention_heads"  # older files
    architecture["num_key_value_heads"] = _value(content, groups, int, file)
    architecture["hidden_act"] = _value(content, "hidden_act", str, file)
    architecture["rms_norm_eps"] = _value(content, "rms_norm_eps", float, file)
    return LlmConfig(architecture, _value(content, "vocab_size", int, file), str(folder), lora_rank=0)


def check_llm_config(folder: Path, config: ModelConfig) -> None:
    """That a folder's config.json, if it has one, says what our settings say.

    Sizes show in the shapes of tensors; the norms' epsilon, the activation and CLIP's layer do not.

    Raises:
        ValueError: a field differs.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    content, architecture = read_object(file), config.llm.architecture
    pairs = [
        (f"model.llm.architecture.{key}", architecture[key], key)
        for key in LLM_FIELDS
        if key in content and key in architecture
    ]
    if "mm_vision_select_layer" in content:
        pairs.append(("model.clip.select_layer", config.clip.select_layer, "mm_vision_select_layer"))
    for key, ours, name in pairs:
        if ours != content[name]:
            raise ValueError(f"{key}={ours}, but {file} says {name}={content[name]}: set {key}={content[name]}")


def read_clip_config(folder: Path, clip: str | None) -> ClipConfig:
    """The vision tower a checkpoint names, and which of its layers the checkpoint reads.

    Args:
        folder: of the checkpoint, whose config.json says ``vision_tower`` and ``mm_vision_select_layer``.
        clip: folder or hub id that replaces ``vision_tower``.

    Raises:
        FileNotFoundError: no such tower.
        ValueError: a config lacks a field.
    """
    file = folder / "config.json"
    content = read_object(file)
    key = next((key for key in ("vision_tower", "mm_vision_tower") if key in content), "vision_tower")
    clip_folder = find_folder(clip, "clip") if clip else _find_named_clip(_value(content, key, str, file), file)
    select_layer = _value(content, "mm_vision_select_layer", int, file)
    return ClipConfig(_clip_architecture(clip_folder / "config.json"), str(clip_folder), select_layer)


def _find_named_clip(name: str, file: Path) -> Path:
    """Inside the checkpoint's folder, beside it, at an absolute path, or on Hugging Face."""
    for candidate in (file.parent / name, file.parent.parent / name):  # an absolute name stands for itself in both
        if candidate.is_dir():
            return candidate
    if _HUB_ID.fullmatch(name):
        return find_folder(name, f"vision_tower of {file}")
    raise FileNotFoundError(
        f"{file}: vision_tower={name} is neither in {file.parent} nor beside it; name the folder of its CLIP by "
        f"--clip (the published GLUS has {DEFAULT_CLIP})"
    )


def _clip_architecture(file: Path) -> dict[str, Any]:
    """Sizes of a vision tower; in the config of a whole CLIP they lie below ``vision_config``."""
    content = read_object(file)
    content = content.get("vision_config", content)
    sizes: dict[str, Any] = {key: _value(content, key, int, file) for key in _CLIP_INTEGERS}
    return sizes | {key: content[key] for key in _CLIP_OPTIONAL if key in content}
