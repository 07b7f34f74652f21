"""Running a trained model, and showing what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING, OmegaConf

from glus.config.data import DatasetConfig, FramesConfig, PathsConfig, QuerySampling
from glus.config.loading import check_max_videos, load_config, require
from glus.config.model import FuserGamma, ModelConfig, Precision, Quantization


class Window(Enum):
    """Which frames a prompt shows besides the one that it asks for."""

    sliding = "sliding"
    clips = "clips"


@dataclass
class InferenceConfig:
    """How a trained model is run over a video."""

    window: Window = Window.sliding
    """``sliding``: the Q - 1 frames before it, the paper's. ``clips``: those before it in its clip, where the video is
    cut into clips of Q frames as in training; several times fewer tokens, an approximation: other masks."""

    memory_stride: int = 3
    """Distance of the strided memories (released GLUS: 3 at inference, 1 in training)."""
    force_seg: bool = False
    """Use the state even where [SEG] is not the arg-max; else that frame's mask is empty and its memory a hole."""
    trailing_space: bool = True
    """Whether the prompt ends in the release's lone "▁". It never occurs there in training, which a
    pretrained LLM shrugs off; for one trained from scratch it is an untrained token, so small models set it off."""

    chunk_frames: int = 16
    """Frames that are encoded together: decides memory and speed, not results."""
    token_budget: int | None = None
    """Tokens that the LLM reads at a time (one prompt at least): decides memory and speed, not results. Null: 16,384 on
    a GPU; 2,048 on a CPU, whose caches are small (measured on the small model: a fifth faster)."""

    memory_gb: float | None = None
    """Memory (2**30 bytes) that sentences may fill while SAM2 segments a frame for them together; if there are more of
    them, it takes them in groups: decides memory and speed, not results. Null: a quarter of what the weights leave of a
    GPU; 1 on a CPU."""

    def __post_init__(self) -> None:
        for name in ("memory_stride", "chunk_frames"):
            require(getattr(self, name) >= 1, f"inference.{name}", "at least 1", getattr(self, name))
        budget = self.token_budget
        require(budget is None or budget >= 1, "inference.token_budget", "null or at least 1", budget)
        room = self.memory_gb
        require(room is None or room > 0, "inference.memory_gb", "null or above 0", room)


@dataclass
class ModelFolderConfig:
    """``config.yaml`` of a model folder: what travels with the weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass
class SettingsConfig:
    """Settings of a model folder that one prediction may override; null keeps what travels with the weights."""

    precision: Precision | None = None
    """Of weights and activations: fp32, bf16 or fp16 (without a GPU null means fp32)."""
    window: Window | None = None
    chunk_frames: int | None = None
    token_budget: int | None = None
    memory_gb: float | None = None
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
    llm_quantization: Quantization | None = None
    """``int8`` or ``nf4``: the LLM in fewer bits (GPU only). Null keeps what the model was trained over."""


@dataclass
class PredictionConfig(SettingsConfig):
    """How ``scripts/predict.py`` runs a model."""

    key_frames: str | None = None
    """JSON file ``{"<video>_<exp_id>": frame}``: each sentence starts at its key frame and goes up and down from there,
    as the released key-frame script does. Null: from the first frame."""


SETTING_PATHS = {
    "precision": "model.precision",
    "window": "inference.window",
    "chunk_frames": "inference.chunk_frames",
    "token_budget": "inference.token_budget",
    "memory_gb": "inference.memory_gb",
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
    "llm_quantization": "model.llm.quantization",
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


class PredictionForm(Enum):
    """How predictions lie on disk."""

    png = "png"
    """``<video>/<exp_id>/<frame>.png``, 0 or 255: what benchmark servers and other tools take."""
    rle = "rle"
    """``<video>.jsonl``, COCO run-length codes, a line per frame: a file per video, and about as many bytes."""


@dataclass
class PredictConfig:
    """``scripts/predict.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    weights: str = MISSING
    """Model folder: a run, one of its checkpoints, or an export."""
    output_dir: str = MISSING
    """Folder of the predictions: a new or empty one, or one that the same model and settings have begun."""
    format: PredictionForm = PredictionForm.png
    inference: PredictionConfig = field(default_factory=PredictionConfig)
    max_videos: int | None = None
    """Only the first so many videos, for a quick look; null: all."""
    allow_cpu: bool = False
    """Run an LLM of a billion parameters or more where no GPU is usable, instead of refusing to."""

    def __post_init__(self) -> None:
        check_max_videos(self.max_videos)


@dataclass
class ScoreFramesConfig:
    """``scripts/score_frames.py``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    weights: str = MISSING
    """Model folder: a run, one of its checkpoints, or an export."""
    output_dir: str = MISSING
    """Folder of the scores and ``key_frames.json``: a new or empty one, or one that the same model has begun."""
    inference: SettingsConfig = field(default_factory=SettingsConfig)
    max_videos: int | None = None
    """Only the first so many videos, for a quick look; null: all."""
    allow_cpu: bool = False
    """Run an LLM of a billion parameters or more where no GPU is usable, instead of refusing to."""

    def __post_init__(self) -> None:
        check_max_videos(self.max_videos)


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
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
