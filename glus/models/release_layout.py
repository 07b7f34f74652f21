"""How published checkpoints say what they are: names of tensors, config.json, their CLIP, and where both lie.

The released GLUS extends LISA's class: SAM2 lies below ``model.visual_model``, the [SEG] head is ``text_hidden_fcs``
(model/GLUS.py), the projector LLaVA's (model/llava/llava_arch.py). SAM2's own files hold its state dict as it is. One
table per layout is read in both directions.

No class of transformers looks at these folders: their ``model_type`` is "llava", which names another model there.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glus.config import ClipConfig, LlmConfig, ModelConfig, SegHeadInit
from glus.files import expanded, field, read_object
from glus.models.foreign import ORIGINAL_LLAVA, is_hub_id
from glus.models.mllm.llava import rotary_frequencies
from glus.models.weight_files import LazyTensor
from glus.models.weights import Source

log = logging.getLogger(__name__)

_BFLOAT16_ROUNDING = 2.0**-8
"""Relative; published files are rounded to bfloat16."""

_LLM = (
    ("model.embed_tokens.", "mllm.llama.model.embed_tokens."),
    ("model.layers.", "mllm.llama.model.layers."),
    ("model.norm.", "mllm.llama.model.norm."),
    ("lm_head.", "mllm.llama.lm_head."),
)
PROJECTOR_PREFIX = "model.mm_projector."
"""LLaVA keeps its projector among the LLM's tensors, under this name."""
_PROJECTOR = ((PROJECTOR_PREFIX, "mllm.projector."),)
_SEG_HEAD = (
    ("model.text_hidden_fcs.0.0.", "seg_head.fc1."),
    ("model.text_hidden_fcs.0.2.", "seg_head.fc2."),
)
_INV_FREQ = ("rotary frequencies (inv_freq), computed here", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SAM1 = (
    "LISA's SAM-1",
    r"model\.visual_model\."
    r"(image_encoder\.(pos_embed|(patch_embed\.|blocks\.|neck\.\d).+)|prompt_encoder\..+|mask_decoder\..+)",
)
_LISA_HEAD = ("LISA's [SEG] head (model.seg_head_init=random)", r"model\.text_hidden_fcs\.0\.[02]\.(weight|bias)")


@dataclass(frozen=True)
class KeyMap:
    """The names of one layout."""

    renamed: tuple[tuple[str, str], ...]
    """(how names start in the file, how they start here); the rest of a name stays."""
    dropped: tuple[tuple[str, str], ...] = ()
    """(what it is, regular expression of whole names): tensors that are left aside knowingly."""
    strangers: tuple[str, str] = ("", "")
    """(regular expression of whole names, what the file may be instead where it has such, for a message)."""

    def source(self, place: str | Path, tensors: Mapping[str, torch.Tensor]) -> Source:
        """A file's tensors under our names; those that are left aside are counted, those that nobody knows listed.

        Args:
            place: of the file, for messages.
            tensors: under the file's names.
        """
        aside = {name: what for name in tensors for what, pattern in self.dropped if re.fullmatch(pattern, name)}
        kept = [name for name in tensors if name not in aside]
        ours: dict[str, torch.Tensor | LazyTensor] = {}
        unknown: list[str] = []
        for name in kept:
            new = replace_start(name, self.renamed)
            if new is None or new in ours:
                unknown.append(name)
            else:
                ours[new] = tensors[name]
        pattern, what = self.strangers
        hint = what if any(re.fullmatch(pattern, name) for name in kept) else ""
        present = [line for line in self.renamed if any(name.startswith(line[0]) for name in kept)]
        label = KeyMap((*present, *self.renamed)).label  # some names have begun in several ways
        return Source(place, ours, None, label, dict(Counter(aside.values())), unknown, hint)

    def in_file(self, name: str) -> str | None:
        """The file's name of one of our tensors; None where this layout does not hold it."""
        return replace_start(name, [(ours, theirs) for theirs, ours in self.renamed])

    def label(self, name: str) -> str:
        """What messages call one of our tensors: its name in the file, or else here."""
        return self.in_file(name) or name


def replace_start(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """A name that begins otherwise, by the first line of (how it begins, how it is to begin) that fits; or None."""
    return next((new + name.removeprefix(old) for old, new in table if name.startswith(old)), None)


GLUS_KEYS = KeyMap(
    renamed=(*_LLM, *_PROJECTOR, *_SEG_HEAD, ("model.visual_model.", "segmenter.sam.")),
    dropped=(_INV_FREQ,),
    strangers=(
        _SAM1[1],
        "it holds SAM-1, as LISA-7B-v1 does: start from it with model.llm.weights, or convert it with --sam2",
    ),
)
"""What ``merge_lora_weights_and_save_hf_model.py`` of the release writes: everything but CLIP."""
SAM2_KEYS = KeyMap(renamed=(("", "segmenter.sam."),))
"""``sam2_hiera_*.pt``, whose "model" is the state dict."""
CLIP_KEYS = KeyMap(
    renamed=(("vision_model.", "mllm.clip.vision_model."), ("", "mllm.clip.vision_model.")),
    dropped=(
        ("position ids, which are constants", r"(vision_model\.)?embeddings\.position_ids"),
        ("the text tower and the projections", r"text_model\..+|(text|visual)_projection\.weight|logit_scale"),
    ),
)
"""Folders of transformers: a vision tower, or a whole CLIP, as OpenAI's are; transformers 5 leaves the prefix out."""


def lisa(seg_head_init: SegHeadInit) -> KeyMap:
    """LISA-7B-v1, or any LLaMA under transformers' names, with or without LLaVA's projector.

    Args:
        seg_head_init: whether its [SEG] head is taken or left aside.
    """
    takes_head = seg_head_init is SegHeadInit.lisa
    return KeyMap(
        renamed=(*_LLM, *_PROJECTOR, *(_SEG_HEAD if takes_head else ())),
        dropped=(_INV_FREQ, _SAM1, *(() if takes_head else (_LISA_HEAD,))),
        strangers=(
            r"model\.visual_model\..+",
            "it holds SAM2, as a merged GLUS does: tools/convert_weights.py makes a model folder of it",
        ),
    )


def check_inv_freq(tensors: Mapping[str, torch.Tensor], architecture: dict[str, Any], source: str | Path) -> None:
    """That the rotary frequencies a file holds, if any, are those of the LLM we build, one for each layer.

    They are computed, never read; but other frequencies would mean another model.

    Args:
        tensors: under the file's names.
        architecture: of the LLM.
        source: for messages.

    Raises:
        ValueError: a layer's are missing, or are others than the architecture's.
    """
    found = {name: value for name, value in tensors.items() if re.fullmatch(_INV_FREQ[1], name)}
    if not found:
        return
    expected = inv_freq_tensors(architecture, torch.float32)
    wrong = sorted(expected.keys() ^ found.keys())
    if wrong:
        raise ValueError(
            f"weights of {source} hold inv_freq of {len(found)} layers, expected {len(expected)}; see {wrong[0]}"
        )
    for name, value in found.items():
        frequencies = expected[name]
        is_close = value.shape == frequencies.shape and torch.allclose(
            value.float(), frequencies, rtol=_BFLOAT16_ROUNDING, atol=0
        )
        if not is_close:
            raise ValueError(
                f"weights of {source}: {name} holds other rotary frequencies than model.llm.architecture gives (base, "
                f"scaling): first ones {value.flatten()[:3].tolist()} of {tuple(value.shape)}, expected "
                f"{frequencies[:3].tolist()} of {tuple(frequencies.shape)}"
            )


def inv_freq_tensors(architecture: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The rotary frequencies of every layer as transformers 4.31 stored them: one equal (head width / 2,) each.

    Args:
        architecture: of the LLM.
        dtype: of the file.
    """
    frequencies = rotary_frequencies(architecture).to(dtype)
    layers = range(architecture["num_hidden_layers"])
    return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in layers}


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLM_FIELDS: dict[str, type] = dict.fromkeys((*_SIZES, "max_position_embeddings", "num_key_value_heads"), int) | {
    "hidden_act": str,
    "rms_norm_eps": float,
}
"""What our config takes over of a checkpoint's config.json, and of what type it must be."""
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
"""Of transformers' LLaMA, where our config does not state them, for what no shape shows."""
_CLIP_SIZES = (*_SIZES, "image_size", "patch_size")
_CLIP_OPTIONAL: dict[str, type] = {"projection_dim": int, "hidden_act": str, "layer_norm_eps": float}
"""Where a file does not state them, transformers' defaults are OpenAI's values."""
CLIP_FIELDS = (*_CLIP_SIZES, *_CLIP_OPTIONAL)
"""What our config takes over of a CLIP's config.json."""
FIXED_FIELDS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": True,
}
"""What our model is; a checkpoint that states another value is another model."""
_MODEL_TYPES = ("llama", "llava", "llava_llama")
"""Of LLaMA and what LLaVA, LISA and GLUS make of it. Others may have tensors of the same names, differently used."""
_ROTARY = re.compile("rope|rotary|theta|yarn|ntk|scaling|alibi", re.IGNORECASE)
"""In the names of settings of what the LLM knows of positions, of whatever version of transformers."""
_LARGEST = 2**31
"""No number in a config.json is as large."""
_PLAIN_ROTARY = {"rope_theta": 10000, "rope_type": "default", "type": "default", "partial_rotary_factor": 1}
_ERROR_FIELDS = {"error", "errors", "message", "detail", "status", "statusCode", "code"}
"""Of what a server sends in place of a file."""
_DOWNLOADED = ["*.json", "config.yaml", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
"""Data only; never code."""
DEFAULT_CLIP = "openai/clip-vit-large-patch14"


def find_folder(name: str | Path, what: str) -> Path:
    """A local folder, or the local copy of a Hugging Face repository, which is downloaded if need be.

    Args:
        name: path of a folder, or ``owner/name``; the latter counts as a path too where a folder ``owner`` is here.
        what: how messages call it.

    Raises:
        FileNotFoundError: no such folder, or the download failed.
    """
    path = expanded(name)
    if path.is_dir():
        return path
    if not is_hub_id(name):
        hint = f"it is a file: give its folder, {path.parent}" if path.is_file() else "expected a folder"
        raise FileNotFoundError(f"{what}={name}: no such folder ({hint}, or owner/name on Hugging Face)")
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
    ids = {token: str(number) for token, number in added.items()}
    names = {number: token for token, number in ids.items()}
    listed = {"added_tokens_decoder": {}} | read_object(file)
    for number, entry in field(listed, "added_tokens_decoder", dict, str(file)).items():
        token = field(entry, "content", str, f"{file}, token {number}")
        if ids.get(token, number) != number or names.get(number, token) != token:
            raise ValueError(f"{file} gives {token} the id {number}, but added_tokens.json says {dict(added)}")


def _read_settings(file: Path) -> dict[str, Any]:
    content = read_object(file)
    if content.keys() <= _ERROR_FIELDS:
        raise ValueError(f"{file} is a server's message, not the file itself: {json.dumps(content)}: get it again")
    return content


def _value(content: dict[str, Any], key: str, kind: type, file: Path, is_signed: bool = False) -> Any:
    """A field of the right type; whole numbers count as float too, True not as a number, nor NaN and infinity."""
    value: Any = content.get(key)
    is_fine = type(value) is kind or (kind is float and type(value) is int)
    if is_fine and kind is not str:
        is_fine = abs(value) < _LARGEST and (is_signed or value > 0)
    if not is_fine:
        limit = "" if is_signed or kind is str else " above 0"
        raise ValueError(f"{file}: {key}={json.dumps(value)}, expected {kind.__name__}{limit}")
    return kind(value)


def _sizes(content: dict[str, Any], kinds: Mapping[str, type], file: Path) -> dict[str, Any]:
    """Fields of an architecture, each of its type."""
    from transformers.activations import ACT2FN

    sizes = {key: _value(content, key, kind, file) for key, kind in kinds.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ValueError(f"{file}: hidden_size={sizes['hidden_size']}, expected a multiple of num_attention_heads")
    if sizes.get("hidden_act", "silu") not in ACT2FN:
        raise ValueError(f"{file}: hidden_act={sizes['hidden_act']}, expected one that transformers knows")
    return sizes


def read_llm_config(folder: Path) -> LlmConfig:
    """Sizes of the LLM by a checkpoint's config.json, without LoRA; its tokenizer lies in the same folder.

    Raises:
        FileNotFoundError, ValueError: the file is missing, lacks a field, or describes another kind of model.
    """
    file = folder / "config.json"
    content = _read_settings(file)
    _check_is_llama(content, {}, file)
    for key, expected in FIXED_FIELDS.items():
        if key in content and content[key] != expected:
            raise ValueError(f"{file}: {key}={json.dumps(content[key])}, but only {json.dumps(expected)} is supported")
    stated = {"num_key_value_heads": content.get("num_attention_heads")} | content  # older files do not state them
    vocab_size = _value(content, "vocab_size", int, file)
    return LlmConfig(_sizes(stated, LLM_FIELDS, file), vocab_size, str(folder), lora_rank=0)


def _check_is_llama(content: dict[str, Any], architecture: dict[str, Any], file: Path) -> None:
    """That a config.json describes a LLaMA, unquantised, with the rotary embedding of ``architecture``.

    The latter shows in no tensor: only files of before transformers 4.32 have ``inv_freq``.
    """
    if "text_config" in content:
        raise ValueError(f"{file} is of LLaVA as transformers writes it (text_config): {ORIGINAL_LLAVA}")
    model_type = content.get("model_type", "llama")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"{file}: model_type={json.dumps(model_type)}, but only {', '.join(_MODEL_TYPES)} are supported"
        )
    if content.get("quantization_config"):
        raise ValueError(f"{file}: quantization_config: quantised weights are not read, take those that are not")
    ours, theirs = _rotary_settings(architecture), _rotary_settings(content)
    if any(setting not in theirs for setting in ours) or any(setting not in ours for setting in theirs):
        stated = {key: content[key] for key in content if _rotary_settings({key: content[key]})}
        texts = [f"{key}={json.dumps(value)}" for key, value in stated.items()] or ["no rope_theta"]
        expected = ", ".join(f"{key}={value}" for key, value in ours) or "rope_theta=10000 without scaling"
        raise ValueError(f"{file}: {', '.join(texts)}, but only {expected} is supported here")


def _rotary_settings(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a config says of the rotary embedding, where it is not LLaMA's plain one: (name, value), in any spelling.

    transformers 4 has ``rope_theta`` and ``rope_scaling``, 5 all in ``rope_parameters``, perhaps by type of layer.
    """
    found, settings = [], [(key, value) for key, value in content.items() if _ROTARY.search(key)]
    while settings:
        key, value = settings.pop()
        if isinstance(value, dict):
            settings += value.items()
        elif value is not None and (type(value) is bool or value != _PLAIN_ROTARY.get(key)):
            found.append((key, value))
    return found


def check_llm_config(folder: Path, config: ModelConfig) -> None:
    """That a folder's config.json, if it has one, says what our settings say.

    Sizes show in the shapes of tensors; the norms' epsilon, the activation, the rotary embedding and CLIP's layer do
    not.

    Raises:
        ValueError: a field differs, or it describes another kind of model.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    content, architecture = _read_settings(file), _DEFAULTS | config.llm.architecture
    _check_is_llama(content, architecture, file)
    ours = {key: (f"model.llm.architecture.{key}", architecture[key]) for key in LLM_FIELDS if key in architecture}
    ours["mm_vision_select_layer"] = ("model.clip.select_layer", config.clip.select_layer)
    for name, (key, value) in ours.items():
        if name in content and value != content[name]:
            raise ValueError(f"{key}={value}, but {file} says {name}={content[name]}: set {key}={content[name]}")


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
    content = _read_settings(file)
    key = next((key for key in ("vision_tower", "mm_vision_tower") if key in content), "vision_tower")
    clip_folder = find_folder(clip, "clip") if clip else _find_named_clip(_value(content, key, str, file), file)
    tower_file = clip_folder / "config.json"
    tower = _read_settings(tower_file)
    tower = field({"vision_config": tower} | tower, "vision_config", dict, str(tower_file))  # a whole CLIP has it apart
    stated = {key: kind for key, kind in _CLIP_OPTIONAL.items() if tower.get(key) is not None}
    sizes = _sizes(tower, dict.fromkeys(_CLIP_SIZES, int) | stated, tower_file)
    select_layer = _value(content, "mm_vision_select_layer", int, file, is_signed=True)
    return ClipConfig(sizes, str(clip_folder), select_layer)


def _find_named_clip(name: str, file: Path) -> Path:
    """Inside the checkpoint's folder, beside it, at an absolute path, or on Hugging Face.

    A path that is not here but ends like the published GLUS's CLIP is taken for it: it is one of another machine.
    """
    for candidate in (file.parent / name, file.parent.parent / name):  # an absolute name stands for itself in both
        if candidate.is_dir():
            return candidate
    if not is_hub_id(name) and Path(name).name == Path(DEFAULT_CLIP).name:
        log.warning("%s: vision_tower=%s is not here, and taken for %s", file, name, DEFAULT_CLIP)
        name = DEFAULT_CLIP
    if is_hub_id(name):
        return find_folder(name, f"vision_tower of {file}")
    raise FileNotFoundError(
        f"{file}: vision_tower={name} is neither in {file.parent} nor beside it; name the folder of its CLIP "
        f"by --clip of tools/convert_weights.py (the published GLUS has {DEFAULT_CLIP})"
    )
