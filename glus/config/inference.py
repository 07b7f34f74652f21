"""How a trained model is run: what travels with its weights, and what one prediction may override."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from glus.config.data import FramesConfig, QuerySampling
from glus.config.loading import at_least, load_config, positive, share
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

    memory_stride: int = at_least(1, default=3)
    """Distance of the strided memories (released GLUS: 3 at inference, 1 in training)."""
    force_seg: bool = False
    """Use the state even where [SEG] is not the arg-max; else that frame's mask is empty and its memory a hole."""
    trailing_space: bool = True
    """Whether the prompt ends in the release's lone "▁". It never occurs there in training, which a
    pretrained LLM shrugs off; for one trained from scratch it is an untrained token, so small models set it off."""
    existence_threshold: float | None = share()
    """A frame's mask is emptied where probability of [SEG] times SAM2's object score is below it; memories stay as they
    are, so that one prediction without it serves to calibrate it (``tools/calibrate_existence.py``). Null or 0: never,
    as released."""

    chunk_frames: int = at_least(1, default=16)
    """Frames that are encoded together: decides memory and speed, not results."""
    token_budget: int | None = at_least(1, default=None)
    """Tokens that the LLM reads at a time (one prompt at least), and a third of those that a batch holds with what its
    prompts continue: decides memory and speed, not results. Null: 16,384 on a GPU; 2,048 on a CPU, whose caches are
    small (measured on the small model: a fifth faster)."""

    memory_gb: float | None = positive(default=None)
    """Memory (2**30 bytes) that sentences may fill while SAM2 segments a frame for them together; if there are more of
    them, it takes them in groups: decides memory and speed, not results. Null: a quarter of what the weights leave of a
    GPU; 1 on a CPU."""


@dataclass
class ModelFolderConfig:
    """``config.yaml`` of a model folder: what travels with the weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def _setting(key: str) -> Any:
    """A field that is null unless it overrides ``key`` of a model folder's config."""
    return field(default=None, metadata={"overrides": key})


@dataclass
class SettingsConfig:
    """Settings of a model folder that one prediction may override; null keeps what travels with the weights."""

    precision: Precision | None = _setting("model.precision")
    """Of weights and activations: fp32, bf16 or fp16 (without a GPU null means fp32)."""
    window: Window | None = _setting("inference.window")
    chunk_frames: int | None = _setting("inference.chunk_frames")
    token_budget: int | None = _setting("inference.token_budget")
    memory_gb: float | None = _setting("inference.memory_gb")
    num_context: int | None = _setting("frames.num_context")
    num_query: int | None = _setting("frames.num_query")
    query_sampling: QuerySampling | None = _setting("frames.query_sampling")
    memory_stride: int | None = _setting("inference.memory_stride")
    memory_frames: int | None = _setting("model.memory.num_frames")
    memory_enabled: bool | None = _setting("model.memory.enabled")
    force_seg: bool | None = _setting("inference.force_seg")
    existence_threshold: float | None = _setting("inference.existence_threshold")
    trailing_space: bool | None = _setting("inference.trailing_space")
    fuser_gamma: FuserGamma | None = _setting("model.segmenter.fuser_gamma")
    """``identity``: as the released evaluator runs; ``checkpoint``: as trained."""
    multimask_fallback: bool | None = _setting("model.segmenter.multimask_fallback")
    llm_quantization: Quantization | None = _setting("model.llm.quantization")
    """``int8`` or ``nf4``: the LLM in fewer bits (GPU only). Null keeps what the model was trained over."""


@dataclass
class PredictionConfig(SettingsConfig):
    """How ``scripts/predict.py`` runs a model."""

    key_frames: str | None = None
    """JSON file ``{"<video>_<exp_id>": frame}``: each sentence starts at its key frame and goes up and down from there,
    as the released key-frame script does. Null: from the first frame."""


def override_settings(config: ModelFolderConfig, settings: SettingsConfig) -> tuple[ModelFolderConfig, list[str]]:
    """A model folder's config with the settings that are not null, and a line for each that this changes.

    Raises:
        ValueError: a value fails its check; the message names the key.
    """
    merged, changes = OmegaConf.structured(config), []
    for setting in fields(SettingsConfig):
        key, wanted = setting.metadata["overrides"], getattr(settings, setting.name)
        present = OmegaConf.select(merged, key)
        if wanted is not None and wanted != present:
            OmegaConf.update(merged, key, wanted)
            changes.append(f"{key}: {_plain(wanted)} instead of the model folder's {_plain(present)}")
    return load_config(ModelFolderConfig, merged), changes


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
