"""What lies where a model was expected, and the command that makes of it what is read: the ends of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ORIGINAL_LLAVA = "take the original layout, as liuhaotian/llava-* and xinlai/LISA-* have it"

_JOIN = "DeepSpeed's zero_to_fp32.py joins its shards: python -m deepspeed.utils.zero_to_fp32"
_FOLDERS = (
    (
        ("adapter_config.json", "adapter_model.*"),
        'it holds a LoRA adapter without its model; merge them by peft: python -c "from peft import '
        "AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}').merge_and_unload().save_pretrained('OUTPUT')\"",
    ),
    (("global_step*", "zero_to_fp32.py"), f"{_JOIN} {{folder}} OUTPUT"),
    (("*mp_rank_*",), f"{_JOIN} {{folder.parent}} OUTPUT"),
    (
        ("*.distcp", "*/*.distcp"),
        "it holds shards of torch.distributed.checkpoint; join them: "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {found.parent} OUTPUT.pt",
    ),
    (("consolidated.*",), "it has Meta's layout; convert it by transformers' convert_llama_weights_to_hf.py"),
    (
        ("*.gguf", "tf_model*", "flax_model*", "*.onnx"),
        "{found.name} is another program's: get model*.safetensors or pytorch_model*.bin, by hf download",
    ),
    (("*.incomplete", "*.part", "*.crdownload", "*.aria2"), "{found.name} is half a download: start it again"),
    (("*.pt", "*.pth", "*.ckpt"), "it holds {found.name}: if these are the weights, name the file itself"),
    (
        ("*/config.json", "snapshots/*/config.json", "*/config.yaml"),
        "models lie further inside, such as {found.parent}",
    ),
    (("config.json",), "its weights are not there: get them by hf download, or git lfs pull if it was cloned"),
)
"""(patterns of files, what a folder is that has such and no weights that can be read); the first row counts."""
_NAMES = (
    (
        r"\.lora_(A|B|embedding_A|embedding_B)\.|\.base_layer\.|\.modules_to_save\.",
        "LoRA adapters that are not merged: save what peft's merge_and_unload() gives, "
        "as the authors' merge_lora_weights_and_save_hf_model.py does",
    ),
    (
        r"(^|\.)language_model\.|^multi_modal_projector\.",
        f"LLaVA as transformers writes it: {ORIGINAL_LLAVA}",
    ),
    (r"\.(qweight|g_idx|absmax|SCB|weight_scale|weight_format)$", "quantised weights: take those that are not"),
    (
        r"^(layers\.\d+\.attention\.wq|tok_embeddings)\.",
        "Meta's names: use convert_llama_weights_to_hf.py of transformers",
    ),
    (r"^vision_encoder\.", "SAM2 as transformers writes it: take Meta's own file, as sam2_hiera_large.pt"),
)
"""(regular expression, what weights are in which such a name is unexpected)."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into the middle of names too."""
_UNWRAP = (
    "{prefix!r} in the names comes of a wrapper (DistributedDataParallel, torch.compile, Lightning ...); without it "
    'they become model.safetensors, to be put in the place of these, by: python -c "from glus.models.weights import '
    "read_tensors as r; from safetensors.torch import save_file as s; s({{k.replace('{prefix}', '', 1): v.contiguous() "
    "for k, v in r('{place}').items()}}, 'model.safetensors')\""
)


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is ``owner/name`` on Hugging Face: no path, unless a folder ``owner`` is here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name))) and not Path(name).parent.is_dir()


def instead_of_weights(place: Path) -> str:
    """What a path without readable weights is: ``": it ..."``, or nothing where that is not known."""
    if is_hub_id(place):
        return f": if it is on Hugging Face, hf download {place} --local-dir weights/{place.name} gets it"
    for patterns, text in _FOLDERS:
        found = next((path for pattern in patterns for path in sorted(place.glob(pattern))), None)
        if found:
            return f": {text.format(folder=place, found=found)}"
    return ""


def misfit_hint(place: str | Path, problems: Mapping[str, Sequence[str]]) -> str:
    """What weights may be that do not fit; empty where that is not known.

    Args:
        place: of the weights.
        problems: as ``LoadReport`` has them, by the names in the file.
    """
    missing, unexpected = problems["missing"], problems["unexpected"]
    for pattern, text in _NAMES:
        if any(re.search(pattern, name) for name in unexpected):
            return text
    if any(" is (0,), " in shape for shape in problems["wrong shape"]):
        return f"ZeRO-3 left empty tensors; {_JOIN} CHECKPOINT OUTPUT"
    before = (name.removesuffix(own) for own in missing for name in unexpected if name.endswith(f".{own}"))
    amid = (wrapper for wrapper in _WRAPPERS for name in unexpected if wrapper in name)
    prefix = next(before, "") or next(amid, "")
    return _UNWRAP.format(prefix=prefix, place=place) if prefix else ""
