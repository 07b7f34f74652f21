"""Every file in configs/ composes, is typed, and says what it should; mistakes in overrides are named."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import glus.config
from glus.config import (
    FuserGamma,
    LlmConfig,
    ModelConfig,
    ModelFolderConfig,
    Precision,
    PredictConfig,
    PretrainConfig,
    Quantization,
    QuerySampling,
    ScoreConfig,
    ScoreFramesConfig,
    SettingsConfig,
    ShowConfig,
    TrainConfig,
    Window,
    load_config,
    override_settings,
)
from glus.config.loading import RENAMED
from glus.config.overrides import check_overrides, groups, print_help, settings
from glus.models.foreign import check_starting_weights

CONFIGS = Path(__file__).parents[1] / "configs"


def names(group: str) -> list[str]:
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra_context() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def compose_train(*overrides: str) -> DictConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiments(experiment: str) -> None:
    config = load_config(TrainConfig, compose_train(f"experiment={experiment}"))
    assert config.data.mixture
    assert config.trainer.steps > 0
    assert config.model.llm.vocab_size > 0


@pytest.mark.parametrize("name", names("model"))
def test_a_model_starts_from_weights_of_its_own_family_alone(name: str) -> None:
    config = load_config(TrainConfig, compose_train("experiment=shapes", f"model={name}", "paths.weights=nowhere"))
    with pytest.raises(FileNotFoundError) as error:
        check_starting_weights(config.model)
    assert ("model.clip.weights=" in str(error.value)) == (config.model.family == "llava")
    assert "set the path" not in str(error.value)


@pytest.mark.parametrize("group", ["data", "loss", "model", "trainer"])
def test_groups(group: str) -> None:
    for name in names(group):
        load_config(TrainConfig, compose_train("experiment=shapes", f"{group}={name}"))


@pytest.mark.parametrize("dataset", names("dataset"))
def test_datasets(dataset: str) -> None:
    config = load_config(TrainConfig, compose_train("experiment=shapes", f"dataset@valid={dataset}"))
    assert config.valid is not None
    assert config.valid.root


@pytest.mark.parametrize(("program", "schema"), [("predict", PredictConfig), ("score_frames", ScoreFramesConfig)])
def test_programs_that_run_a_model_take_every_setting(program: str, schema: type) -> None:
    ConfigStore.instance().store("schema", schema)
    begin = ["weights=here", "output=there"]
    settings = [f"inference.{setting.name}=null" for setting in fields(SettingsConfig)]
    config = load_config(schema, compose(program, [*begin, *settings, "inference.window=clips", "allow_cpu=true"]))
    wanted = schema(config.dataset, config.paths, "here", "there", allow_cpu=True)
    wanted.inference.window, wanted.inference.num_query = Window.clips, None
    assert config == wanted
    assert config.dataset.name == "shapes_valid"
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'inference\.windo'"):
        compose(program, [*begin, "inference.windo=clips"])


def test_frames_are_scored_with_one_query_frame() -> None:
    """The prompt that a sentence gets which starts there."""
    assert (ScoreFramesConfig().inference.num_query, PredictConfig().inference.num_query) == (1, None)


def test_pretraining() -> None:
    ConfigStore.instance().store("schema", PretrainConfig)
    assert load_config(PretrainConfig, compose("pretrain")).parts is None


def test_recipes_of_the_paper() -> None:
    small, large = (load_config(TrainConfig, compose_train(f"experiment={name}")) for name in ("glus_s", "glus_a"))
    for config in (small, large):
        trainer = config.trainer
        assert (trainer.global_batch_size, trainer.learning_rate, trainer.betas) == (80, 3e-4, [0.9, 0.95])
        assert (config.frames.num_context, config.frames.num_query) == (4, 4)
        assert config.model.memory.detach
        assert config.model.segmenter.multimask_fallback
        assert config.inference.memory_stride == 3
    assert (small.trainer.steps, large.trainer.steps) == (3000, 5000)
    released = {"seg": 1.0, "bce": 2.0, "dice": 0.5, "contrastive": 0.1}
    assert small.loss.weights == {**released, "iou": 0.0, "mask_iou": 0.0, "object_score": 0.0}
    assert large.loss.weights["contrastive"] == 0
    weights = {name: item.weight for name, item in large.data.mixture.items()}
    assert weights == {"mevis": 40, "ref_youtube_vos": 150, "ref_davis17": 4, "revos": 30, "lvvis": 30}


def test_command_line_wins_over_experiment() -> None:
    config = load_config(TrainConfig, compose_train("experiment=paper/global_only", "frames.num_query=2"))
    assert config.frames.query_sampling is QuerySampling.uniform
    assert config.frames.num_query == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [("trainer.stepz=3", "stepz"), ("trainer.steps=many", "steps"), ("model.memory.enabled=maybe", "enabled")],
)
def test_wrong_overrides_are_named(override: str, named: str) -> None:
    with pytest.raises(ConfigCompositionException, match=named):
        compose_train("experiment=shapes", override)


def test_checks_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"trainer.zero_stage=1: expected 2 or 3"):
        load_config(TrainConfig, compose_train("experiment=shapes", "trainer.zero_stage=1"))
    with pytest.raises(ValueError, match=r"no value for .*trainer.steps"):
        load_config(TrainConfig, OmegaConf.create({"output": "x", "model": {"llm": {"vocab_size": 1}}}))
    with pytest.raises(ValueError, match=r"unknown config key 'trainer.stepz': did you mean steps"):
        load_config(TrainConfig, OmegaConf.create({"trainer": {"stepz": 1}}))
    with pytest.raises(ValueError, match=r"unknown config key 'valid.namee': did you mean name\?"):
        load_config(TrainConfig, OmegaConf.create({"valid": {"namee": "x"}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames.num_context=-1", r"frames\.num_context=-1: expected at least 0"),
        ("model.llm.lora_dropout=1", r"model\.llm\.lora_dropout=1\.0: expected a share in \[0, 1\)"),
        ("data.mixture.shapes.weight=0", r"data\.mixture\.shapes\.weight=0\.0: expected a positive weight"),
        ("loss.weights.bce=-1", r"loss\.weights\.bce=-1\.0: expected 0 \(off\) or a positive weight"),
        ("trainer.betas=[0.9]", r"trainer\.betas=\[0\.9\]: expected two numbers"),
        ("trainer.keep_best=IoU", r"trainer\.keep_best='IoU': expected J, F, J&F or null"),
        ("trainer.offload=parameters", r"trainer\.zero_stage=2: expected 3 where trainer\.offload=parameters"),
        ("inference.token_budget=0", r"inference\.token_budget=0: expected at least 1 or null"),
        ("valid.expected.videos=0", r"valid\.expected\.videos=0: expected at least 1 or null"),
        ("+valid.sha256.file=abc", r"valid\.sha256\.file='abc': expected 64 hexadecimal digits"),
    ],
)
def test_values_out_of_range_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, compose_train("experiment=shapes", override))


@pytest.mark.parametrize(("head", "weight"), [("true", "0"), ("false", "0.1")])
def test_the_iou_head_exists_only_to_be_trained(head: str, weight: str) -> None:
    overrides = ("experiment=glus_s", f"model.iou_head={head}", f"loss.weights.iou={weight}")
    with pytest.raises(ValueError, match=r"model\.iou_head=\w+: expected (true|false) where loss\.weights\.iou is"):
        load_config(TrainConfig, compose_train(*overrides))
    config = load_config(TrainConfig, compose_train("experiment=glus_s", "model.iou_head=true", "loss.weights.iou=0.1"))
    assert config.loss.weights["iou"] == 0.1


def _folder() -> ModelFolderConfig:
    return ModelFolderConfig(ModelConfig(llm=LlmConfig(vocab_size=9, tokenizer="here")))


def test_every_setting_of_a_model_folder_can_be_overridden() -> None:
    wanted = SettingsConfig(
        precision=Precision.bf16,
        window=Window.clips,
        chunk_frames=4,
        token_budget=1024,
        memory_gb=0.5,
        num_context=8,
        num_query=2,
        query_sampling=QuerySampling.uniform,
        memory_stride=1,
        memory_frames=5,
        memory_enabled=False,
        force_seg=True,
        existence_threshold=0.5,
        trailing_space=False,
        fuser_gamma=FuserGamma.identity,
        multimask_fallback=False,
        llm_quantization=Quantization.nf4,
    )
    assert None not in vars(wanted).values()
    config, changes = override_settings(_folder(), wanted)
    assert (config.frames.num_context, config.frames.num_query) == (8, 2)
    assert config.frames.query_sampling is QuerySampling.uniform
    assert config.inference.window is Window.clips
    assert (config.inference.chunk_frames, config.inference.token_budget) == (4, 1024)
    assert config.inference.memory_gb == 0.5
    assert (config.inference.memory_stride, config.inference.force_seg) == (1, True)
    assert not config.inference.trailing_space
    assert (config.model.memory.num_frames, config.model.memory.enabled) == (5, False)
    assert config.model.segmenter.fuser_gamma is FuserGamma.identity
    assert not config.model.segmenter.multimask_fallback
    assert config.model.llm.quantization is Quantization.nf4
    assert config.model.precision is Precision.bf16
    assert config.inference.existence_threshold == 0.5
    assert len(changes) == len(vars(wanted)) == len(fields(SettingsConfig))
    assert "model.segmenter.fuser_gamma: identity instead of the model folder's checkpoint" in changes
    assert override_settings(config, wanted) == (config, [])
    assert override_settings(config, SettingsConfig()) == (config, [])


def test_a_setting_out_of_range_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"frames\.num_query=0: expected at least 1"):
        override_settings(_folder(), SettingsConfig(num_query=0))


def test_training_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.precision='fp16': expected fp32 or bf16 in training"):
        load_config(TrainConfig, compose_train("experiment=shapes", "output=x", "model.precision=fp16"))


SOURCES = [path.read_text() for folder in ("scripts", "tools") for path in (CONFIGS.parent / folder).glob("*.py")]
PROGRAMS = {
    program: getattr(glus.config, schema)
    for source in SOURCES
    for program, schema in re.findall(r"Jobs\(\"(\w+)\", (\w+)", source)
}


@pytest.mark.parametrize(("program", "schema"), PROGRAMS.items())
def test_every_setting_has_a_meaning(program: str, schema: type) -> None:
    assert [setting.key for setting in settings(schema) if not setting.meaning] == []
    assert {group.split("@")[0] for group in groups(program)} <= {path.name for path in CONFIGS.iterdir()}


def test_help_shows_what_an_experiment_changes() -> None:
    ConfigStore.instance().store("schema", TrainConfig)
    values = OmegaConf.to_container(compose_train("experiment=shapes"), enum_to_str=True)
    console = Console(width=120, file=io.StringIO())
    print_help(console, "train", TrainConfig, "Train GLUS.\n\n    glus train ``experiment=shapes``", values)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[:3] == ["Train GLUS.", "", "    glus train experiment=shapes"]
    assert max(map(len, lines)) <= 120
    text = " ".join(console.file.getvalue().split())
    assert "trainer.steps 300 Optimizer steps" in text
    assert "hardware gpu1_24gb, gpu1_24gb_offload" in text
    assert "inference.window sliding sliding: the Q - 1 frames before it, the paper's. clips:" in text
    assert "data.mixture.<name>.weight" in text
    assert "valid.*" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepz=3", r"'trainer.stepz': did you mean trainer.steps"),
        ("steps=3", r"'steps': did you mean trainer.steps\?"),
        ("++output_dir=x", r"'output_dir': renamed to output$"),
        ("trainer.eval_videos=2", r"'trainer.eval_videos': renamed to trainer.eval_max_videos$"),
        ("eval_videos=2", r"'eval_videos': did you mean trainer.eval_max_videos\?"),
        ("xyzzy=1", r"'xyzzy': --help lists all"),
        ("experiment=paper/memry", r"did you mean paper/memory"),
        ("model=qwen", r"model=qwen: expected one of glus_7b, glus_internvl3_2b"),
        ("+dataset@valid=shapes_vaild", r"dataset=shapes_vaild: did you mean shapes_valid"),
    ],
)
def test_what_is_near_a_wrong_override(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_overrides("train", TrainConfig, [override])


def test_a_renamed_key_says_its_new_name() -> None:
    for program, schema, key in (("show", ShowConfig, "num_videos"), ("predict", PredictConfig, "output_dir")):
        with pytest.raises(ValueError, match=rf"'{key}': renamed to {RENAMED[key]}$"):
            check_overrides(program, schema, [f"{key}=1"])
    for schema, key in ((ShowConfig, "num_videos"), (TrainConfig, "output_dir"), (TrainConfig, "trainer.eval_videos")):
        content = OmegaConf.create({})
        OmegaConf.update(content, key, 1)
        group, dot, name = key.rpartition(".")
        with pytest.raises(ValueError, match=rf"'{key}': renamed to {group}{dot}{RENAMED[name]}$"):
            load_config(schema, content)


def test_no_name_of_before_is_a_key_today() -> None:
    schemas = (TrainConfig, PredictConfig, ScoreFramesConfig, ShowConfig, PretrainConfig)
    ends = {setting.key.split(".")[-1] for schema in schemas for setting in settings(schema)}
    assert not RENAMED.keys() & ends
    assert set(RENAMED.values()) <= ends


def test_right_overrides_pass() -> None:
    fine = [
        "experiment=paper/both,glus_s",
        "~valid",
        "valid=null",
        "+valid.sha256.x=y",
        "data.mixture.a.weight=2",
        "-m",
    ]
    fine += ["model.llm.architecture.x.y=1", "hydra.run.dir=x", "+dataset@valid=shapes_valid", "--cfg", "job"]
    check_overrides("train", TrainConfig, fine)
    check_overrides("score", ScoreConfig, ["dataset=mine", "--config-dir=here"])
    check_overrides("score", ScoreConfig, ["dataset=[shapes_valid,mevis_valid]"])
