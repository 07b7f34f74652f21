"""Every setting of the project: type, meaning, unit, source and check. YAML in ``configs/`` holds only values.

``load_config(schema, cfg)`` turns a composed Hydra config into one of these dataclasses; nothing below it ever sees
a DictConfig, and no module of the network sees a config at all (``models/build.py`` takes them apart).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

Schema = TypeVar("Schema")


class Layout(Enum):
    """How a benchmark lies on disk."""

    mevis = "mevis"
    ref_youtube_vos = "ref_youtube_vos"


class QuerySampling(Enum):
    """Where query frames come from."""

    consecutive = "consecutive"
    uniform = "uniform"


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


class Missing(Enum):
    """What a missing prediction does to a score."""

    zero = "zero"
    drop = "drop"
    error = "error"


def _require(condition: bool, key: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expected}")


@dataclass
class ClipConfig:
    """The frozen vision tower that the LLM sees through."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of ``transformers.CLIPVisionConfig``; stated in full so that the model builds without any download."""
    weights: str | None = None
    """Folder of a CLIP as transformers saves it; null leaves the tower at random."""
    select_layer: int = -2
    """Index into ``hidden_states``; -2, the output of the last but one layer, is LLaVA's choice."""
    pool: int = 4
    """Patches averaged into one visual token: 1-D, consecutive in raster order, before the projector."""

    def __post_init__(self) -> None:
        _require(self.pool >= 1, "model.clip.pool", "a positive number of patches", self.pool)


@dataclass
class LlmConfig:
    """The language model."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of ``transformers.LlamaConfig`` except ``vocab_size``, which ``vocab_size`` below holds."""
    vocab_size: int = MISSING
    """Rows of embeddings and head; at least the tokenizer's size (32004 for LLaMA-1 with GLUS's four tokens)."""
    tokenizer: str = MISSING
    """Folder with ``tokenizer.model`` and ``added_tokens.json``."""
    weights: str | None = None
    """Folder or file of a LLaMA under transformers' names (safetensors or ``.bin``, shards too), which may hold LLaVA's
    projector and LISA's [SEG] head as well: LISA-7B-v1 as published. Null leaves it at random."""
    lora_rank: int = 8
    """Rank of LoRA; 0: no LoRA."""
    lora_alpha: int = 16
    """LoRA scale is alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before LoRA's A, in training."""
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Projections of the LLM's attention that get LoRA."""

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 0, "model.llm.lora_rank", "0 (off) or a positive rank", self.lora_rank)
        _require(0 <= self.lora_dropout < 1, "model.llm.lora_dropout", "a share in [0, 1)", self.lora_dropout)


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
    num_frames: int = 7
    """Frames read at most: the previous one and ``num_frames - 1`` on the stride."""
    stride: int = 1
    """Distance of the strided memories in training; inference has its own, ``inference.memory_stride``."""
    detach: bool = True
    """``True``: memories carry no gradient, as released. ``False``: end to end, the paper's words."""

    def __post_init__(self) -> None:
        _require(self.num_frames >= 1, "model.memory.num_frames", "at least 1", self.num_frames)
        _require(self.stride >= 1, "model.memory.stride", "at least 1", self.stride)


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
    seg_head_gain: float = 1.0
    """Factor on the initial output weights of a random [SEG] head; 1: PyTorch's initialisation, as released. A small
    SAM2 hardly answers prompts so much shorter than those it was pre-trained with."""
    trainable: list[str] = field(
        default_factory=lambda: ["lora", "embeddings", "lm_head", "seg_head", "projector", "mask_decoder"]
    )
    """Names of ``models.build.PARTS`` that are trained; all else is frozen and runs under no_grad."""
    precision: Precision = Precision.fp32
    """Weights and activations; bf16 on a GPU as released, fp32 on a CPU."""

    def __post_init__(self) -> None:
        _require(self.seg_head_gain > 0, "model.seg_head_gain", "a positive number", self.seg_head_gain)


@dataclass
class FramesConfig:
    """Which frames a conversation sees; the model itself reads the counts from its inputs."""

    num_context: int = 4
    """K, spread over the whole video; 0 drops the context turn altogether ("local only")."""
    num_query: int = 4
    """Q, the frames that are segmented together."""
    query_sampling: QuerySampling = QuerySampling.consecutive
    """``consecutive``: Q neighbouring frames. ``uniform`` ("global only"): in training one random frame from each of
    Q equal parts of the video; at inference frame t with the Q - 1 frames before it at distance ceil(T / Q)."""

    def __post_init__(self) -> None:
        _require(self.num_context >= 0, "frames.num_context", "0 or more", self.num_context)
        _require(self.num_query >= 1, "frames.num_query", "at least 1", self.num_query)


@dataclass
class DatasetConfig:
    """One split of one benchmark."""

    name: str = MISSING
    """How messages, reports and ``ObjectKey`` call it."""
    layout: Layout = MISSING
    """Which reader understands it."""
    root: str = MISSING
    """Folder as officially distributed."""
    split: str = MISSING
    """``train``, ``valid_u``, ``valid``, ..."""
    expressions: str | None = None
    """Expression file below ``root``; null: where the layout has it."""
    images: str | None = None
    """Folder of the videos' frames below ``root``; null: where the layout has it."""
    masks: str | None = None
    """Mask file or folder below ``root``; null: where the layout has it."""
    groups: str | None = None
    """Sidecar file below the split folder: {video: {exp_id: group}}; its groups are scored apart (Shapes' kinds)."""


@dataclass
class MixtureItem:
    """One dataset of the training mixture."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    weight: float = 1.0
    """Share of draws, relative to the other datasets' weights."""

    def __post_init__(self) -> None:
        _require(
            self.weight > 0, "data.mixture.*.weight", "a positive weight (delete the entry to drop it)", self.weight
        )


@dataclass
class DataConfig:
    """What training draws from."""

    mixture: dict[str, MixtureItem] = field(default_factory=dict)
    expressions_per_video: int = 3
    """Sentences drawn without replacement for each drawn video; fewer where a video has fewer."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""

    def __post_init__(self) -> None:
        _require(
            self.expressions_per_video >= 1, "data.expressions_per_video", "at least 1", self.expressions_per_video
        )


@dataclass
class ContrastiveConfig:
    """Object contrastive loss."""

    queue_size: int = 512
    """Embeddings kept per rank, first in first out."""
    temperature: float = 0.07
    """Divides the cosine similarities."""
    num_negatives: int = 128
    """Negatives drawn with replacement per anchor; an anchor with fewer candidates gives no term."""
    min_terms: int = 1
    """Fewer terms than this in the global batch count as none (release: 2)."""
    datasets: list[str] | None = None
    """Names of the datasets that feed the queue (release: MeViS alone); null: all."""
    exclude_same_objects: bool = False
    """Never take the same objects at other frames as negatives (release: False)."""

    def __post_init__(self) -> None:
        _require(self.queue_size >= 1, "loss.contrastive.queue_size", "at least 1", self.queue_size)
        _require(self.temperature > 0, "loss.contrastive.temperature", "a positive number", self.temperature)


@dataclass
class LossConfig:
    """Weights of the terms of the objective; a weight of 0 switches a term off."""

    weights: dict[str, float] = field(default_factory=lambda: {"seg": 1.0, "bce": 2.0, "dice": 0.5, "contrastive": 0.1})
    """Names are those of ``losses.objective.TERMS`` and "contrastive" (released values; GLUS-A trains without it)."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            _require(weight >= 0, f"loss.weights.{name}", "0 (off) or a positive weight", weight)


@dataclass
class WandbConfig:
    """Weights & Biases, beside ``metrics.jsonl``, which is always written."""

    enabled: bool = False
    project: str = "glus"
    mode: str = "online"
    """``online`` or ``offline`` (then ``wandb sync`` later)."""

    def __post_init__(self) -> None:
        _require(self.mode in ("online", "offline"), "trainer.wandb.mode", "online or offline", self.mode)


@dataclass
class TrainerConfig:
    """The loop and its optimizer."""

    steps: int = MISSING
    """Optimizer steps (GLUS-S 3000, GLUS-A 5000)."""
    global_batch_size: int = 80
    """Videos per optimizer step over all ranks and accumulation steps; accumulation is derived from it."""
    micro_batch_size: int = 2
    """Videos per forward pass and rank."""
    learning_rate: float = 3e-4
    """Peak, reached after the warm-up."""
    warmup_steps: int = 100
    """Linear from 0; then linear decay to 0 at the last step."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0, 2 or 3."""
    gradient_checkpointing: bool = True
    """Recompute the LLM's layers in the backward pass instead of keeping their activations."""
    seed: int = 0
    """Decides initial weights and every drawn sample."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_every: int = 0
    """Optimizer steps between two evaluations on ``valid``; 0: only after the last step, if ``valid`` is set."""
    eval_videos: int = 8
    """Videos of ``valid`` (the first ones) that an evaluation during training segments."""
    save_every: int = 500
    """Optimizer steps between two checkpoints; the last step is always saved."""
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(self.zero_stage in (0, 2, 3), "trainer.zero_stage", "0, 2 or 3", self.zero_stage)
        for name in ("global_batch_size", "micro_batch_size", "log_every", "save_every"):
            _require(getattr(self, name) >= 1, f"trainer.{name}", "at least 1", getattr(self, name))
        _require(len(self.betas) == 2, "trainer.betas", "two numbers", self.betas)


@dataclass
class InferenceConfig:
    """How a trained model is run over a video."""

    memory_stride: int = 3
    """Distance of the strided memories (released GLUS: 3 at inference, 1 in training)."""
    force_seg: bool = False
    """Use the state even where [SEG] is not the arg-max; else that frame's mask is empty and its memory a hole."""
    trailing_space: bool = True
    """Whether the prompt ends in the release's lone "▁". It never occurs there in training, which a
    pretrained LLM shrugs off; for one trained from scratch it is an untrained token, so small models set it off."""

    def __post_init__(self) -> None:
        _require(self.memory_stride >= 1, "inference.memory_stride", "at least 1", self.memory_stride)


@dataclass
class PathsConfig:
    """Where things lie on this machine: the one group to edit."""

    data: str = "data"
    """Folder that holds the benchmarks."""
    weights: str = "weights"
    """Folder that holds downloaded checkpoints."""
    outputs: str = "outputs"
    """Folder that holds runs."""


@dataclass
class TrainConfig:
    """``scripts/train.py``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    valid: DatasetConfig | None = None
    """Split that is evaluated during training; null: none."""
    output_dir: str = MISSING
    """Run folder: resolved config, run info, metrics.jsonl, checkpoints."""

    def __post_init__(self) -> None:
        # ZeRO-3 gathers parameters by collective calls, which ranks that segment different videos would not make alike.
        _require(
            self.valid is None or self.trainer.zero_stage < 3,
            "trainer.zero_stage",
            "0 or 2 where valid is set (set valid=null, and evaluate checkpoints with scripts/predict.py)",
            self.trainer.zero_stage,
        )


@dataclass
class PretrainConfig:
    """``tools/pretrain_towers.py``: tokenizer, CLIP, SAM2 and LLM of a small model, from generated scenes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    output_dir: str = MISSING
    """Gets ``tokenizer/``, ``clip/``, ``sam2.pt`` and ``llm/``."""
    parts: list[str] = field(default_factory=lambda: ["tokenizer", "clip", "sam2", "llm"])
    """What to make. The LLM needs tokenizer and CLIP; SAM2 needs nothing, so two processes can share the work."""
    num_scenes: int = 300
    """Generated videos to learn from."""
    num_frames: int = 16
    """Their length."""
    seed: int = 0
    learning_rate: float = 1e-3
    """Peak, of each part."""
    clip_steps: int = 1500
    clip_batch_size: int = 32
    """Frames per step."""
    sam2_steps: int = 1600
    sam2_batch_size: int = 6
    """Clips per step."""
    sam2_clip_frames: int = 3
    """Frames per clip in the second part of SAM2's pre-training."""
    llm_steps: int = 1500
    llm_batch_size: int = 12
    """Videos per step in the first part of the LLM's pre-training."""

    def __post_init__(self) -> None:
        known = ("tokenizer", "clip", "sam2", "llm")
        _require(set(self.parts) <= set(known), "parts", f"names among {', '.join(known)}", self.parts)


@dataclass
class ModelFolderConfig:
    """``config.yaml`` of a model folder: what travels with the weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass
class SettingsConfig:
    """Settings of a model folder that one prediction may override; null keeps what travels with the weights."""

    num_context: int | None = None
    num_query: int | None = None
    query_sampling: QuerySampling | None = None
    memory_stride: int | None = None
    """Of inference (``inference.memory_stride``)."""
    memory_frames: int | None = None
    memory_enabled: bool | None = None
    force_seg: bool | None = None
    trailing_space: bool | None = None
    fuser_gamma: FuserGamma | None = None
    """``identity``: as the released evaluator runs; ``checkpoint``: as trained."""
    multimask_fallback: bool | None = None


SETTING_PATHS = {
    "num_context": "frames.num_context",
    "num_query": "frames.num_query",
    "query_sampling": "frames.query_sampling",
    "memory_stride": "inference.memory_stride",
    "memory_frames": "model.memory.num_frames",
    "memory_enabled": "model.memory.enabled",
    "force_seg": "inference.force_seg",
    "trailing_space": "inference.trailing_space",
    "fuser_gamma": "model.segmenter.fuser_gamma",
    "multimask_fallback": "model.segmenter.multimask_fallback",
}
"""Field of ``SettingsConfig`` -> the key of ``ModelFolderConfig`` it overrides."""


def override_settings(config: ModelFolderConfig, settings: SettingsConfig) -> tuple[ModelFolderConfig, list[str]]:
    """A model folder's config with the settings that are not null, and a line for each that this changes.

    Raises:
        ValueError: a value fails its check; the message names the key.
    """
    merged, changes = OmegaConf.structured(config), []
    for name, path in SETTING_PATHS.items():
        wanted, present = getattr(settings, name), OmegaConf.select(merged, path)
        if wanted is not None and wanted != present:
            OmegaConf.update(merged, path, wanted)
            changes.append(f"{path}: {_plain(wanted)} instead of the model folder's {_plain(present)}")
    return load_config(ModelFolderConfig, merged), changes


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


@dataclass
class PredictConfig:
    """``scripts/predict.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    weights: str = MISSING
    """Model folder: a run, one of its checkpoints, or an export."""
    output_dir: str = MISSING
    """Predictions go to ``<output_dir>/<video>/<exp_id>/<frame>.png``."""
    settings: SettingsConfig = field(default_factory=SettingsConfig)
    max_videos: int | None = None
    """Only the first so many videos, for a quick look; null: all."""

    def __post_init__(self) -> None:
        value = self.max_videos
        _require(value is None or value >= 1, "max_videos", "null or at least 1", value)


@dataclass
class ShowConfig:
    """``scripts/show.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    predictions: str = MISSING
    """Folder ``<video>/<exp_id>/<frame>.png``, as ``scripts/predict.py`` writes it."""
    output_dir: str = MISSING
    """Folder for the pictures and movies; files of an earlier run with the same names are replaced."""
    num_videos: int = 4
    """Videos shown: the first ones of the split."""
    videos: list[str] | None = None
    """Ids of the videos to show instead."""
    num_expressions: int = 4
    """Sentences shown per video at most: the first of each group in turn."""
    num_frames: int = 6
    """Frames of a strip, spread over the video."""
    frames_per_second: int = 8
    """Speed of the movies."""

    def __post_init__(self) -> None:
        for name in ("num_videos", "num_expressions", "num_frames", "frames_per_second"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass
class ScoreConfig:
    """``scripts/score.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    predictions: str = MISSING
    """Folder ``<video>/<exp_id>/<frame>.png``, any non-zero pixel is foreground."""
    missing: Missing = Missing.zero
    """A missing prediction scores 0 and is listed, is dropped from the mean, or is an error."""
    num_workers: int = 2
    """Scoring processes; scores do not depend on it."""
    output: str | None = None
    """Folder for report.json and per_expression.csv; default: ``predictions``."""
    max_videos: int | None = None
    """Only the first so many videos, as ``predict.py max_videos``; null: all."""

    def __post_init__(self) -> None:
        _check_scoring(self.num_workers, self.max_videos)


@dataclass
class CompareConfig:
    """``scripts/compare.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    predictions: dict[str, str] = MISSING
    """Label of a model -> folder of its predictions; the first is the one the summary is about."""
    output: str = MISSING
    """Summary JSON in percent; the scores of every expression go beside it, with the suffix ``.csv``."""
    num_workers: int = 2
    """Processes; results do not depend on it."""
    max_videos: int | None = None
    """Only the first so many videos, as ``predict.py max_videos``; null: all."""

    def __post_init__(self) -> None:
        _check_scoring(self.num_workers, self.max_videos)


def _check_scoring(num_workers: int, max_videos: int | None) -> None:
    _require(num_workers >= 1, "num_workers", "at least 1", num_workers)
    _require(max_videos is None or max_videos >= 1, "max_videos", "null (all) or at least 1", max_videos)


def load_config(schema: type[Schema], cfg: DictConfig) -> Schema:
    """The typed form of a composed config.

    Raises:
        ValueError: unknown key, wrong type, missing value or failed check, naming the key.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}: set {missing[0]}=... on the command line or in YAML")
        typed = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ValueError(f"unknown config key {error.full_key!r}: {_known_keys(schema, error.full_key)}") from error
    except MissingMandatoryValue as error:
        raise ValueError(f"no value for config key {error.full_key!r}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    return typed


def to_yaml(config: object) -> str:
    """A typed config as YAML that ``load_config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _known_keys(schema: Any, full_key: str | None) -> str:
    """The keys that exist where ``full_key`` was looked for."""
    for part in (full_key or "").split(".")[:-1]:
        inner = next((f for f in fields(schema) if f.name == part), None)
        default = inner.default_factory() if inner and callable(inner.default_factory) else None
        if not is_dataclass(default):
            break
        schema = type(default)
    return f"{schema.__name__} knows {', '.join(f.name for f in fields(schema))}"
