"""Checkpoints in the authors' layouts, written for tests from a model of ours; the names are spelled out here anew.

Source of the names and of config.json: METHOD 3 of the project's notes, that is what the authors' classes write under
transformers 4.31. Nothing of ``glus.models.release_layout`` is used, or a wrong table would agree with itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from glus.models.glus import Glus
from glus.models.weights import read_tensors
from glus.tokens import Vocabulary
from tests.edits import edit_json

INDEX = "pytorch_model.bin.index.json"
CONFIG_CONSTANTS = {
    "architectures": ["GLUSForCausalLM"],
    "model_type": "llava",  # which means another class to today's transformers
    "mm_use_im_start_end": True,
    "mm_vision_select_feature": "patch",
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
SAM1_NAMES = (
    "image_encoder.pos_embed",
    "image_encoder.patch_embed.proj.weight",
    "image_encoder.blocks.0.attn.rel_pos_h",
    "image_encoder.blocks.31.mlp.lin2.bias",
    "image_encoder.neck.0.weight",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.point_embeddings.0.weight",
    "mask_decoder.iou_token.weight",
    "mask_decoder.transformer.layers.1.mlp.lin1.weight",
)


def language_tensors(glus: Glus) -> dict[str, torch.Tensor]:
    """LLM, its 4.31 copies of the rotary frequencies, projector and [SEG] head under the release's names."""
    raw = {name.removeprefix("mllm.llama."): value for name, value in _part(glus, "mllm.llama.").items()}
    config = glus.mllm.llama.config
    width = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    for layer in range(config.num_hidden_layers):
        raw[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
    for kind in ("weight", "bias"):
        raw[f"model.mm_projector.{kind}"] = getattr(glus.mllm.projector, kind).detach().clone()
        raw[f"model.text_hidden_fcs.0.0.{kind}"] = getattr(glus.seg_head.fc1, kind).detach().clone()
        raw[f"model.text_hidden_fcs.0.2.{kind}"] = getattr(glus.seg_head.fc2, kind).detach().clone()
    return raw


def glus_tensors(glus: Glus) -> dict[str, torch.Tensor]:
    """A merged GLUS checkpoint."""
    sam2 = {f"model.visual_model.{name}": value.clone() for name, value in glus.segmenter.sam.state_dict().items()}
    return language_tensors(glus) | sam2


def lisa_tensors(glus: Glus) -> dict[str, torch.Tensor]:
    """LISA: the same language part, and SAM-1."""
    return language_tensors(glus) | {f"model.visual_model.{name}": torch.randn(3, 2) for name in SAM1_NAMES}


def _part(glus: Glus, prefix: str) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in glus.state_dict().items() if name.startswith(prefix)}


def write_checkpoint(
    folder: Path, raw: dict[str, torch.Tensor], glus: Glus, vocabulary: Vocabulary, form: str = "bin shards"
) -> Path:
    """A folder as published: weights in one of four forms, config.json, tokenizer; its CLIP in ``clip`` beside it."""
    write_settings(folder, glus, vocabulary)
    write_weights(folder, raw, form)
    write_clip(folder.parent / "clip", glus)
    return folder


def write_settings(folder: Path, glus: Glus, vocabulary: Vocabulary) -> None:
    """All of a checkpoint's folder but its weights: config.json, tokenizer."""
    folder.mkdir(parents=True)
    llama, encoder = glus.mllm.llama.config, glus.mllm.clip
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {key: getattr(llama, key) for key in (*fields, "max_position_embeddings", "hidden_act", "rms_norm_eps")}
    config |= {"vocab_size": llama.vocab_size, "vision_tower": "clip", "mm_vision_select_layer": encoder.select_layer}
    (folder / "config.json").write_text(json.dumps(CONFIG_CONSTANTS | config))
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copyfile(vocabulary.folder / name, folder / name)


def write_weights(folder: Path, raw: dict[str, torch.Tensor], form: str) -> None:
    """``form``: "bin", "bin shards", "safetensors" or "safetensors shards"; the latter two with an index."""
    is_bin = form.startswith("bin")
    stem, ending = ("pytorch_model", "bin") if is_bin else ("model", "safetensors")
    write = torch.save if is_bin else save_file
    if not form.endswith("shards"):
        write(raw, folder / f"{stem}.{ending}")
        return
    names, half = list(raw), len(raw) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        write({name: raw[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_clip(folder: Path, glus: Glus) -> None:
    """The vision tower as transformers 4 saves it."""
    folder.mkdir(exist_ok=True)
    tower = glus.mllm.clip.vision_model
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    sizes = {key: getattr(tower.config, key) for key in fields}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **sizes}))
    tensors = {f"vision_model.{name}": value.clone() for name, value in tower.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")


def read_copies(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file or folder that may be written to: what ``read_tensors`` gives would change with the file."""
    return {name: value.clone() for name, value in read_tensors(path).items()}


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply ``change`` to the tensors of each "bin" shard."""
    weight_map = {}
    for file in sorted(folder.glob("pytorch_model-*.bin")):
        tensors = read_copies(file)
        change(tensors)
        torch.save(tensors, file)
        weight_map |= dict.fromkeys(tensors, file.name)
    edit_json(folder / INDEX, lambda index: index.update(weight_map=weight_map))
