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
from glus.config.inference import (
    InferenceConfig,
    ModelFolderConfig,
    PredictionConfig,
    SettingsConfig,
    Window,
    override_settings,
)
from glus.config.loading import leaves, load_config, plain_config, read_config, to_yaml
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
    SegState,
    VisionConfig,
)
from glus.config.programs import (
    AblateConfig,
    AblationClaim,
    AblationConfig,
    AblationRow,
    CalibrateConfig,
    CheckConfig,
    CompareConfig,
    Missing,
    PredictConfig,
    PredictionForm,
    PretrainConfig,
    ReportConfig,
    ScoreConfig,
    ScoreFramesConfig,
    ShowConfig,
    StartFrame,
    SubmitConfig,
)
from glus.config.training import (
    BUCKET_NUMBERS,
    GIB,
    ContrastiveConfig,
    HardwareConfig,
    LossConfig,
    Offload,
    OnNonfinite,
    RecipeConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
    nominal_tflops,
)
