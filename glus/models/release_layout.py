"""How published checkpoints say what they are: names of tensors, config.json, their CLIP, and where both lie.

The released GLUS extends LISA's class: SAM2 lies below ``model.visual_model``, the [SEG] head is ``text_hidden_fcs``
(model/GLUS.py), the projector LLaVA's (model/llava/llava_arch.py). SAM2's own files hold its state dict as it is. One
table per layout is read in both directions.

No class of transformers looks at these folders: their ``model_type`` is "llava", which names another model there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glus.config import ClipConfig, LlmConfig, ModelConfig, SegHeadInit
from glus.files import read_object
from glus.models.mllm.llava import rotary_frequencies
from glus.models.weight_files import LazyTensor
from glus.models.weights import Source

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
        ours: dict[str, torch.Tensor | LazyTensor] = {}
        dropped: Counter[str] = Counter()
        unknown: list[str] = []
        hint = ""
        for name, value in tensors.items():
            reason = next((what for what, pattern in self.dropped if re.fullmatch(pattern, name)), None)
            new = _replace_start(name, self.renamed)
            if reason:
                dropped[reason] += 1
                continue
            if new is None or new in ours:
                unknown.append(name)
            else:
                ours[new] = value
            if re.fullmatch(self.strangers[0], name):
                hint = self.strangers[1]
        return Source(place, ours, None, self.label, dict(dropped), unknown, hint)

    def in_file(self, name: str) -> str | None:
        """The file's name of one of our tensors; None where this layout does not hold it."""
        return _replace_start(name, [(ours, theirs) for theirs, ours in self.renamed])

    def label(self, name: str) -> str:
        """What messages call one of our tensors: its name in the file, or else here."""
        return self.in_file(name) or name


def _replace_start(name: str, table: Iterable[tuple[str, str]]) -> str | None:
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
_CLIP_SIZES = (*_SIZES, "image_size", "patch_size")
_CLIP_OPTIONAL = ("projection_dim", "hidden_act", "layer_norm_eps")
"""Where a file does not state them, transformers' defaults are OpenAI's values."""
CLIP_FIELDS = (*_CLIP_SIZES, *_CLIP_OPTIONAL)
"""What our config takes over of a CLIP's config.json."""
FIXED_FIELDS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": True,
}
"""What our model is; a checkpoint that states another value is another model."""
_DOWNLOADED = ["*.json", "config.yaml", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
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


def _value(content: dict[str, Any], key: str, kind: type, file: Path) -> Any:
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
    for key, expected in (FIXED_FIELDS | {"rope_theta": 10000}).items():
        if key in content and content[key] != expected:
            raise ValueError(f"{file}: {key}={json.dumps(content[key])}, but only {json.dumps(expected)} is supported")
    stated = {"num_key_value_heads": content.get("num_attention_heads")} | content  # older files do not state them
    architecture = {key: _value(stated, key, kind, file) for key, kind in LLM_FIELDS.items()}
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
    content = read_object(file)
    key = next((key for key in ("vision_tower", "mm_vision_tower") if key in content), "vision_tower")
    clip_folder = find_folder(clip, "clip") if clip else _find_named_clip(_value(content, key, str, file), file)
    tower_file = clip_folder / "config.json"
    tower = read_object(tower_file)
    tower = tower.get("vision_config", tower)  # where a whole CLIP has its vision tower's
    sizes = {key: _value(tower, key, int, tower_file) for key in _CLIP_SIZES}
    sizes |= {key: tower[key] for key in _CLIP_OPTIONAL if key in tower}
    return ClipConfig(sizes, str(clip_folder), _value(content, "mm_vision_select_layer", int, file))


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
