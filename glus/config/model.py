"""The network and its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from glus.config.loading import at_least, checked, positive


class FuserGamma(Enum):
    """Which scale the memory encoder's ConvNeXt blocks use."""

    checkpoint = "checkpoint"
    identity = "identity"


class SegHeadInit(Enum):
    """Where the [SEG] head starts from."""

    random = "random"
    lisa = "lisa"


class Precision(Enum):
    """Floating-point type of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Quantization(Enum):
    """How the LLM's frozen projections are stored."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class SegState(Enum):
    """Which state of the LLM a [SEG] embedding is made of."""

    predicting = "predicting"
    """The one before [SEG], as released."""
    at = "at"
    """That of [SEG] itself, as in Sa2VA."""


@dataclass
class ClipConfig:
    """The frozen vision tower that LLaVA's LLM sees through."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of ``transformers.CLIPVisionConfig``; stated in full so that the model builds without any download."""
    weights: str | None = None
    """Folder of a CLIP as transformers saves it; null leaves the tower at random."""
    select_layer: int = -2
    """Index into ``hidden_states``; -2, the output of the last but one layer, is LLaVA's choice."""
    pool: int = at_least(1, default=4)
    """Patches averaged into one visual token: 1-D, consecutive in raster order, before the projector."""


@dataclass
class VisionConfig:
    """How the other families see frames; LLaVA has ``clip``."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's vision config in transformers (``InternVLVisionConfig``, ``Qwen3VLVisionConfig``, ...)."""
    context_size: int = at_least(1, default=448)
    """InternVL: side of the square that a context frame is seen as. The Qwens: it is seen with its own aspect ratio and
    at most so many pixels squared."""
    query_size: int = at_least(1, default=448)
    """Likewise of a query frame."""
    pool: int = at_least(1, default=1)
    """InternVL: visual tokens are averaged over squares of so many along each side."""


@dataclass
class LlmConfig:
    """The language model."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of the text model's config in transformers (LLaVA: ``LlamaConfig``) except ``vocab_size`` and
    ``tie_word_embeddings``, which stand below."""
    vocab_size: int = MISSING
    """Rows of embeddings and head; at least the tokenizer's size (32004 for LLaMA-1 with GLUS's four tokens). Rows that
    published tables lack are new: the mean of the others."""
    tokenizer: str = MISSING
    """Folder with ``tokenizer.model`` and ``added_tokens.json`` (LLaVA), or with ``tokenizer.json``."""
    weights: str | None = None
    """Folder or file of a LLaMA under transformers' names (safetensors or ``.bin``, shards too), which may hold LLaVA's
    projector and LISA's [SEG] head as well: LISA-7B-v1 as published. Of another family, the folder that transformers'
    ``save_pretrained`` writes of the whole of it. Null leaves it at random."""
    lora_rank: int = checked(lambda rank: rank >= 0, "0 (off) or a positive rank", default=8)
    """Rank of LoRA; 0: no LoRA."""
    lora_alpha: int = 16
    """LoRA scale is alpha / rank."""
    lora_dropout: float = checked(lambda share: 0 <= share < 1, "a share in [0, 1)", default=0.05)
    """Dropout before LoRA's A, in training."""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Projections of the LLM's attention that get LoRA."""
    quantization: Quantization = Quantization.none
    """``int8`` or ``nf4`` (4 bits, QLoRA's): the frozen projections in fewer bits, by bitsandbytes, on a GPU only. LoRA
    is trained over them as they are; merging it into them is refused."""

    tied: bool = False
    """The head is the embedding table, as in the small Qwens; LLaVA's is not."""

    @property
    def num_parameters(self) -> int:
        """Roughly: the tables and the layers' products, with as many keys and values as queries. What ``architecture``
        leaves open is as LLaMA-7B has it."""
        sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, **self.architecture}
        width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
        return int(width * (layers * (4 * width + 3 * sizes["intermediate_size"]) + 2 * self.vocab_size))


@dataclass
class SegmenterConfig:
    """SAM2."""

    variant: str = "sam2_hiera_l"
    """Name of a packaged configuration of sam2 1.1.0: ``sam2_hiera_{t,s,b+,l}`` or ``sam2.1_hiera_{t,s,b+,l}``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted keys below ``model`` of that configuration, with the values that replace them (small models)."""
    weights: str | None = None
    """File with ``{"model": state dict}``, as ``sam2_hiera_large.pt``; null leaves it at random."""
    fuser_gamma: FuserGamma = FuserGamma.checkpoint
    """``checkpoint``: as trained. ``identity``: 1e-6, what the released evaluator runs with."""
    multimask_fallback: bool = True
    """At inference, replace an unstable mask by the best of the three alternatives. Off for a model
    whose alternative-mask and IoU heads were never trained."""


@dataclass
class MemoryConfig:
    """The memory bank."""

    enabled: bool = True
    """Off: every frame takes the empty-bank path and nothing is stored."""
    num_frames: int = at_least(1, default=7)
    """Frames read at most: the previous one and ``num_frames - 1`` on the stride."""
    stride: int = at_least(1, default=1)
    """Distance of the strided memories in training; inference has its own, ``inference.memory_stride``."""
    detach: bool = True
    """``True``: memories carry no gradient, as released. ``False``: end to end, the paper's words."""


@dataclass
class ModelConfig:
    """The whole network."""

    clip: ClipConfig = field(default_factory=ClipConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    weights: str | None = None
    """Model folder or run that training starts from: an export, a converted checkpoint. All its weights are taken, its
    adapters merged; null: each part has weights of its own."""
    seg_head_init: SegHeadInit = SegHeadInit.random
    """``random``: the [SEG] head starts anew, as released, although LISA-7B-v1 holds one of the same shape. ``lisa``:
    it starts as the ``text_hidden_fcs`` that ``llm.weights`` must then hold."""
    seg_head_gain: float = positive(default=1.0)
    """Factor on the initial output weights of a random [SEG] head; 1: PyTorch's initialisation, as released. A small
    SAM2 hardly answers prompts so much shorter than those it was pre-trained with."""
    seg_state: SegState = SegState.predicting
    """The state that a [SEG] embedding is made of: ``predicting``, the one before [SEG], as released; or ``at`` [SEG],
    which the prompt then ends with, so that one pass gives both."""
    seg_prompts: int = checked({1, 2}.__contains__, "1 or 2", default=1)
    """Tokens that a [SEG] prompts the mask decoder with; released: 1."""
    iou_head: bool = False
    """Whether a small head predicts, from the [SEG] state, the IoU that a frame's mask will reach: what
    ``scripts/score_frames.py`` chooses key frames by. Trained wherever it exists; goes with ``loss.weights.iou``."""
    trainable: list[str] = field(
        default_factory=lambda: ["lora", "embeddings", "lm_head", "seg_head", "projector", "mask_decoder"]
    )
    """Names of ``PARTS`` (of the MLLM and the segmenter, ``seg_head``, ``iou_head``) that are trained; all else is
    frozen. In place of ``embeddings`` and ``lm_head``, ``embeddings_new_rows`` and ``lm_head_new_rows`` train the added
    tokens' rows alone (32 k parameters for 262 M at full size); the release trains whole tables."""
    precision: Precision = Precision.fp32
    """Weights and activations; bf16 on a GPU as released, fp32 on a CPU."""
    family: str = "llava"
    """Of the MLLM, a key of ``models.build.FAMILIES``: llava, internvl, qwen3_vl, qwen2_5_vl."""
    vision: VisionConfig = field(default_factory=VisionConfig)
