"""What lies where a model was expected, and the command that makes of it what is read, or that downloads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from glus.config import ModelConfig

ORIGINAL_LLAVA = "take the original layout, as liuhaotian/llava-* and xinlai/LISA-* have it"
_MERGE = "save what peft's merge_and_unload() gives, as the authors' merge_lora_weights_and_save_hf_model.py does"
_JOIN = "DeepSpeed's zero_to_fp32.py joins its shards: python -m deepspeed.utils.zero_to_fp32"
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
_META = "it has Meta's layout; convert it by transformers' convert_llama_weights_to_hf.py"
_FOLDERS = {
    r"adapter_(config|model)\..*": f"it holds a LoRA adapter without its model; {_MERGE}",
    r"global_step\d+|zero_to_fp32\.py": f"{_JOIN} {{folder}} OUTPUT",
    r".*mp_rank_\d+.*": f"{_JOIN} {{folder.parent}} OUTPUT",
    r".*\.distcp": f"torch joins the shards of its distributed checkpoints: {_DCP} {{found.parent}} OUTPUT.pt",
    r"consolidated\..*": _META,
    r".*\.(gguf|onnx)|(tf|flax)_model.*": "{found.name} is another program's; hf download gets model*.safetensors",
    r".*\.(incomplete|part|crdownload|aria2)": "{found.name} is half a download: start it again",
    r"[^/]*\.(pt|pth|ckpt)": "it holds {found.name}: if these are the weights, name the file itself",
    r".+/config\.(json|yaml)": "models lie further inside, such as {found.parent}",
    r"config\.json": "its weights are not there; hf download gets them, or git lfs pull where it was cloned",
}
"""Regular expression of a file in a folder without weights that can be read -> what such a folder is. The first counts.
"""
_NAMES = {
    r"\.lora_[^.]*[AB]\.|\.base_layer\.|\.modules_to_save\.": f"LoRA adapters that are not merged; {_MERGE}",
    r"(^|\.)language_model\.|^multi_modal_projector\.": f"LLaVA as transformers writes it: {ORIGINAL_LLAVA}",
    r"\.(qweight|g_idx|absmax|SCB|weight_scale|weight_format)$": "quantised weights: take those that are not",
    r"^layers\.\d+\.attention\.|^tok_embeddings\.": _META,
    r"^vision_encoder\.": "SAM2 as transformers writes it: take Meta's own file, as sam2_hiera_large.pt",
}
"""Regular expression of an unexpected name -> what weights are in which such is."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into the middle of names too."""
_UNWRAP = (
    "{prefix!r} in the names is a wrapper's (DistributedDataParallel, torch.compile, Lightning ...); without it they "
    'become model.safetensors, to be put in the place of these, by: python -c "from glus.models.weights import '
    "read_tensors as r; from safetensors.torch import save_file as s; s({{k.replace('{prefix}', '', 1): v.contiguous() "
    "for k, v in r('{place}').items()}}, 'model.safetensors')\""
)

_DOWNLOADS = {
    r".*/LISA-[^/]*": "hf download xinlai/{place.name} --local-dir {place}",
    r".*/clip-vit-[^/]*": "hf download openai/{place.name} --local-dir {place}",
    r".*/InternVL3-[^/]*": "hf download OpenGVLab/{place.name} --local-dir {place}",
    r".*/Qwen[0-9.]+-VL-[^/]*": "hf download Qwen/{place.name} --local-dir {place}",
    r".*/sam2_hiera_[^/]*\.pt": "curl -L --create-dirs -o {place} "
    "https://dl.fbaipublicfiles.com/segment_anything_2/072824/{place.name}",
    r".*/shapes/(clip|tokenizer|llm|sam2\.pt)": "glus towers output={place.parent}",
    r".*/shapes_[^/]*/(tokenizer|mllm)": "glus towers 'parts=[tokenizer,mllm]' output={place.parent} model=...",
}
"""Regular expression of a path of starting weights -> the command that downloads or makes them."""


def how_to_get(place: str | Path) -> str:
    """The command that downloads or makes starting weights, by the name of their file or folder; "" if unknown."""
    found = (text for pattern, text in _DOWNLOADS.items() if re.fullmatch(pattern, f"/{place}"))
    return next(found, "").format(place=Path(place))


def hub_id(place: str | Path) -> str:
    """``owner/name`` on Hugging Face of published starting weights, by the name of their file or folder; or ""."""
    if sam2 := re.fullmatch(r"sam2(?:\.1)?_hiera_\w+", Path(place).stem):
        return f"facebook/{sam2[0].replace('_', '-')}"
    command = how_to_get(place)
    return command.split()[2] if command.startswith("hf download") else ""


def check_starting_weights(model: ModelConfig) -> None:
    """Look for all that a model starts from before any of it is read.

    Raises:
        FileNotFoundError: something is not there; the message names all of it, and the commands that get it.
    """
    wanted = {"model.llm.tokenizer": model.llm.tokenizer}
    if not model.weights:
        wanted |= {f"model.{part}.weights": getattr(model, part).weights for part in ("clip", "llm", "segmenter")}
    missing = {key: place for key, place in wanted.items() if place and not Path(place).exists()}
    if missing:
        commands = dict.fromkeys(how_to_get(place) or f"set the path of {place}" for place in missing.values())
        lines = [f"{key}={place}" for key, place in missing.items()]
        raise FileNotFoundError("\n  ".join(["missing weights:", *lines, "they come by", *commands]))


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is ``owner/name`` on Hugging Face: no path, unless a folder ``owner`` is here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name))) and not Path(name).parent.is_dir()


def instead_of_weights(place: Path) -> str:
    """What a path without readable weights is: ``": it ..."``, or nothing where that is not known."""
    if is_hub_id(place):
        return f": if it is on Hugging Face, hf download {place} --local-dir weights/{place.name} gets it"
    files = [file for depth in ("*", "*/*", "snapshots/*/*") for file in sorted(place.glob(depth))]
    for pattern, text in _FOLDERS.items():
        found = next((file for file in files if re.fullmatch(pattern, file.relative_to(place).as_posix())), None)
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
    known = (text for pattern, text in _NAMES.items() if any(re.search(pattern, name) for name in unexpected))
    before = (name.removesuffix(own) for own in missing for name in unexpected if name.endswith(f".{own}"))
    amid = (wrapper for wrapper in _WRAPPERS for name in unexpected if wrapper in name)
    if any(" is (0,), " in shape for shape in problems["wrong shape"]):
        return f"ZeRO-3 left empty tensors; {_JOIN} CHECKPOINT OUTPUT"
    prefix = next(before, "") or next(amid, "")
    return next(known, "") or (_UNWRAP.format(prefix=prefix, place=place) if prefix else "")
