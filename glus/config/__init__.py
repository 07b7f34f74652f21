"""Every setting of the project: type, meaning, unit, source and check. YAML in ``configs/`` holds only values.

``load_config(schema, cfg)`` turns a composed Hydra config into one of these dataclasses; nothing below it ever sees
a DictConfig, and no module of the network sees a config at all (``models/build.py`` takes them apart).
"""

from glus.config.data import (
    DataConfig,
    DatasetConfig,
    ExpectedCounts,
    FramesConfig,
    Layout,
    MixtureItem,
    PathsConfig,
    Protocol,
    QuerySampling,
)
from glus.config.evaluation import CheckConfig, CompareConfig, Missing, ScoreConfig, SubmitConfig
from glus.config.hardware import HardwareConfig
from glus.config.inference import (
    SETTING_PATHS,
    InferenceConfig,
    ModelFolderConfig,
    PredictConfig,
    PredictionConfig,
    PredictionForm,
    ScoreFramesConfig,
    SettingsConfig,
    ShowConfig,
    Window,
    override_settings,
)
from glus.config.loading import load_config, to_yaml
from glus.config.model import (
    ClipConfig,
    FuserGamma,
    LlmConfig,
    MemoryConfig,
    ModelConfig,
    Precision,
    Quantization,
    SegHeadInit,
    SegmenterConfig,
)
from glus.config.recipe import RecipeConfig
from glus.config.training import (
    ContrastiveConfig,
    LossConfig,
    Offload,
    OnNonfinite,
    PretrainConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)

__all__ = [
    "SETTING_PATHS",
    "CheckConfig",
    "ClipConfig",
    "CompareConfig",
    "ContrastiveConfig",
    "DataConfig",
    "DatasetConfig",
    "ExpectedCounts",
    "FramesConfig",
    "FuserGamma",
    "HardwareConfig",
    "InferenceConfig",
    "Layout",
    "LlmConfig",
    "LossConfig",
    "MemoryConfig",
    "Missing",
    "MixtureItem",
    "ModelConfig",
    "ModelFolderConfig",
    "Offload",
    "OnNonfinite",
    "PathsConfig",
    "Precision",
    "PredictConfig",
    "PredictionConfig",
    "PredictionForm",
    "PretrainConfig",
    "Protocol",
    "Quantization",
    "QuerySampling",
    "RecipeConfig",
    "ScoreConfig",
    "ScoreFramesConfig",
    "SegHeadInit",
    "SegmenterConfig",
    "SettingsConfig",
    "ShowConfig",
    "SubmitConfig",
    "TrainConfig",
    "TrainerConfig",
    "WandbConfig",
    "Window",
    "load_config",
    "override_settings",
    "to_yaml",
]
