"""Which tensor of a published checkpoint is which of ours: one table per layout, read in both directions.

The released GLUS extends LISA's class: SAM2 lies below ``model.visual_model``, the [SEG] head is ``text_hidden_fcs``
(model/GLUS.py), the projector LLaVA's (model/llava/llava_arch.py). SAM2's own files hold its state dict as it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from glus.config import SegHeadInit
from glus.models.mllm.llava import rotary_frequencies

Value = TypeVar("Value")
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


_FORMER = (("clip.", "mllm.clip."), ("projector.", "mllm.projector."), ("language.llama.", "mllm.llama."))
"""Names in model folders and checkpoints of before the MLLM was one part of the network, and now."""


def current_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Tensors of a model folder of ours, however old, under today's names."""
    return {_replace_start(name, _FORMER) or name: value for name, value in tensors.items()}


@dataclass(frozen=True)
class Renamed:
    """Tensors of a file under our names."""

    tensors: dict[str, torch.Tensor]
    dropped: dict[str, int]
    """What was left aside knowingly -> number of tensors."""
    unknown: tuple[str, ...]
    """Names in the file that the table does not know."""


@dataclass(frozen=True)
class KeyMap:
    """The names of one layout."""

    layout: str
    """What messages call it."""
    renamed: tuple[tuple[str, str], ...]
    """(how names start in the file, how they start here); the rest of a name stays."""
    dropped: tuple[tuple[str, str], ...]
    """(what it is, regular expression of whole names): tensors that are left aside knowingly."""

    def rename(self, tensors: Mapping[str, torch.Tensor]) -> Renamed:
        """Sort a file's tensors into those we take, those we drop and those nobody knows."""
        ours: dict[str, torch.Tensor] = {}
        dropped: Counter[str] = Counter()
        unknown: list[str] = []
        for name, value in tensors.items():
            reason = self.drop_reason(name)
            new = None if reason else _replace_start(name, self.renamed)
            if reason:
                dropped[reason] += 1
            elif new is None:
                unknown.append(name)
            else:
                ours[new] = value
        return Renamed(ours, dict(dropped), tuple(unknown))

    def drop_reason(self, name: str) -> str | None:
        """What a tensor that is left aside is; None: it is not left aside."""
        return next((what for what, pattern in self.dropped if re.fullmatch(pattern, name)), None)

    def in_file(self, name: str) -> str | None:
        """The file's name of one of our tensors; None where this layout does not hold it."""
        return _replace_start(name, tuple((ours, theirs) for theirs, ours in self.renamed))

    def label(self, name: str) -> str:
        """What messages call one of our tensors: its name in the file, or else here."""
        return self.in_file(name) or name


def _replace_start(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for old, new in table:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


GLUS = KeyMap(
    "merged GLUS", (*_LLM, *_PROJECTOR, *_SEG_HEAD, ("model.visual_model.", "segmenter.sam.")), dropped=(_INV_FREQ,)
)
"""What ``merge_lora_weights_and_save_hf_model.py`` of the release writes: everything but CLIP."""
SAM2 = KeyMap("SAM2", (("", "segmenter.sam."),), dropped=())
"""``sam2_hiera_*.pt``, whose "model" is the state dict."""


def lisa(seg_head_init: SegHeadInit) -> KeyMap:
    """LISA-7B-v1, or any LLaMA under transformers' names, with or without LLaVA's projector.

    Args:
        seg_head_init: whether its [SEG] head is taken or left aside.
    """
    if seg_head_init is SegHeadInit.lisa:
        return KeyMap("LISA", (*_LLM, *_PROJECTOR, *_SEG_HEAD), dropped=(_INV_FREQ, _SAM1))
    return KeyMap("LISA", (*_LLM, *_PROJECTOR), dropped=(_INV_FREQ, _SAM1, _LISA_HEAD))


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
        if value.shape != frequencies.shape or not value.is_floating_point():
            raise ValueError(
                f"weights of {source}: {name} is {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}, "
                f"expected {tuple(frequencies.shape)}, floating point"
            )
        if not torch.allclose(value.float(), frequencies, rtol=_BFLOAT16_ROUNDING, atol=0):
            raise ValueError(
                f"weights of {source}: {name} holds other rotary frequencies than model.llm.architecture gives "
                f"(base, scaling): first ones {value[:3].tolist()}, expected {frequencies[:3].tolist()}"
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


def lisa_hint(renamed: Renamed) -> str:
    """Why weights that should be LISA's may not fit; empty: no idea."""
    if any(name.startswith("model.visual_model.") for name in renamed.unknown):
        return "it holds SAM2, as a merged GLUS does: tools/convert_weights.py makes a model folder of it"
    return ""


def glus_hint(names: Iterable[str]) -> str:
    """Why weights under these names in the file, which should be a merged GLUS, may not fit; empty: no idea."""
    if any(re.fullmatch(_SAM1[1], name) for name in names):
        return "it holds SAM-1, as LISA-7B-v1 does: start from it with model.llm.weights, or convert it with --sam2"
    return ""
