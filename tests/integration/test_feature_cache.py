"""Training on cached features: the same losses without a tower, and a clear error wherever the cache does not fit."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from glus.batch import Batch
from glus.config import FeatureCacheConfig, LossConfig, ModelConfig, TrainConfig
from glus.data.chat.llava import ConversationTokenizer
from glus.data.dataset import Mixture
from glus.data.features import FeatureStore
from glus.data.frames import FrameStore
from glus.data.loader import build_loader, build_mixture
from glus.losses.objective import build_objective
from glus.models.features import feature_keys
from glus.models.glus import Glus
from glus.models.pretrained import build_glus
from glus.tokens import Vocabulary
from tests.integration.conftest import read_metrics
from tools.cache_features import cache_features, towers_only

BOTH = ["clip", "sam2"]
TOLERANCE = 1e-6
FRAMES = [f"{number:05d}" for number in range(8)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_train_config: Callable[..., TrainConfig]) -> Path:
    """The features of both towers of the six training videos."""
    folder = tmp_path_factory.mktemp("features")
    assert fill(cached(tiny_train_config(), folder)) == 0
    return folder


@pytest.fixture
def copied(filled: Path, tmp_path: Path) -> Path:
    """The same, for a test to damage."""
    return Path(shutil.copytree(filled, tmp_path / "features"))


def cached(config: TrainConfig, folder: Path, parts: list[str] = BOTH) -> TrainConfig:
    config.data.feature_cache = FeatureCacheConfig(str(folder), parts)
    return config


def fill(config: TrainConfig, console: Console | None = None) -> int:
    return cache_features(config, console or Console(quiet=True))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def build(config: TrainConfig) -> tuple[Glus, Mixture, Vocabulary]:
    """What ``scripts/train.py`` builds."""
    torch.manual_seed(config.trainer.seed)
    vocabulary, glus = Vocabulary(config.model.llm.tokenizer), build_glus(config.model).train()
    tokenizer = ConversationTokenizer(vocabulary, glus.tokens_per_frame)
    keys = feature_keys(glus, config.model, config.data.feature_cache.used_parts())
    mixture = build_mixture(config.data, config.frames, tokenizer, glus.clip.image_size, config.trainer.seed, keys)
    return glus, mixture, vocabulary


def step(config: TrainConfig) -> tuple[dict[str, float], dict[str, torch.Tensor], Counter[str], Batch]:
    """Losses and gradients of the first two samples, and the number of times that each tower ran."""
    glus, mixture, vocabulary = build(config)
    runs: Counter[str] = Counter()
    for name, tower in {
        "clip": glus.clip.vision_model.encoder.layers[0],
        "sam2": glus.segmenter.sam.image_encoder,
    }.items():
        tower.register_forward_pre_hook(lambda module, inputs, name=name: runs.update([name]))
    batch = next(build_loader(mixture, [[0, 1]], config.data.num_workers, vocabulary.pad_id))
    objective = build_objective(LossConfig({"seg": 1.0, "bce": 2.0, "dice": 0.5}), vocabulary.seg_id)
    losses = objective(glus(batch), batch, objective.counts([batch]), np.random.default_rng(0))
    losses["total"].backward()
    gradients = {name: p.grad for name, p in glus.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in losses.items()}, gradients, runs, batch


@pytest.mark.parametrize("parts", [["clip"], ["sam2"], BOTH])
def test_a_step_is_the_same_without_its_towers(
    tiny_train_config: Callable[..., TrainConfig], filled: Path, parts: list[str]
) -> None:
    losses, gradients, runs, _ = step(tiny_train_config())
    assert runs == {"clip": 1, "sam2": 1}
    got, got_gradients, got_runs, batch = step(cached(tiny_train_config(), filled, parts))
    assert got_runs == {name: 1 for name in BOTH if name not in parts}
    assert (batch.query_clip.dtype is torch.uint8, batch.query_frames[0].dtype is torch.uint8) == (
        "clip" not in parts,
        "sam2" not in parts,
    )
    for name, value in losses.items():
        assert got[name] == pytest.approx(value, rel=TOLERANCE), name
    assert got_gradients.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((got_gradients[name] - gradient).abs().max()) <= TOLERANCE * largest, name


def test_a_run_is_the_same(
    run_training: Callable, tiny_train_config: Callable[..., TrainConfig], filled: Path, tmp_path: Path
) -> None:
    plain = tiny_train_config(output_dir=str(tmp_path / "plain"))
    fast = cached(tiny_train_config(output_dir=str(tmp_path / "fast")), filled)
    for config in (plain, fast):
        done = run_training(config)
        assert done.is_ok, done.output[-6000:]
    expected, got = (
        [line["total"] for line in read_metrics(tmp_path / name) if "total" in line] for name in ("plain", "fast")
    )
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=TOLERANCE)


def test_without_context_frames_and_with_workers(tiny_train_config: Callable[..., TrainConfig], filled: Path) -> None:
    config = cached(tiny_train_config(), filled)
    config.frames.num_context, config.data.num_workers = 0, 1
    losses, _, runs, batch = step(config)
    assert batch.context_clip.shape[:2] == (2, 0)
    assert not runs
    assert np.isfinite(losses["total"])


def test_features_keep_their_type(tiny_train_config: Callable, tmp_path: Path) -> None:
    frames = FrameStore(tiny_train_config().data.mixture["shapes"].dataset)
    video = next(path.name for path in sorted(frames.folder.iterdir()))
    store = FeatureStore(tmp_path / "deep" / "folder", frames)
    features = torch.randn(8, 3, 5).to(torch.bfloat16)
    store.write(video, FRAMES, iter(features.split(3)))
    read = store.read(video, [FRAMES[7], FRAMES[0], FRAMES[7]])
    assert read.dtype is torch.bfloat16
    assert torch.equal(read, features[[7, 0, 7]])


# ------------------------------------------------------------------------------------------------------- filling


def test_filling_goes_on_where_it_stopped(tiny_train_config: Callable[..., TrainConfig], copied: Path) -> None:
    missing, cut, *others = files = files_of(copied)
    assert len(files) == 12
    before = {path: path.read_bytes() for path in files}
    missing.unlink()
    cut.write_bytes(before[cut][:-1])
    missing.with_name(f".{missing.name}.tmp").write_bytes(b"left by a kill")
    times = {path: path.stat().st_mtime_ns for path in others}
    assert fill(cached(tiny_train_config(), copied)) == 0
    assert {path: path.read_bytes() for path in files_of(copied)} == before
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert not list(copied.rglob("*.tmp"))


def test_an_undecodable_frame_leaves_no_half_file(
    tiny_train_config: Callable[..., TrainConfig], shapes_folder: Path, tmp_path: Path
) -> None:
    config = moved(tiny_train_config(), shapes_folder, tmp_path)
    last_frame_of_first_video(tmp_path / "shapes").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"frame shapes_train/\S+/00007 does not decode"):
        fill(cached(config, tmp_path / "features", ["clip"]))
    assert [path.name for path in (tmp_path / "features").rglob("*") if path.is_file()] == [".claims"]


def test_a_video_that_another_process_encodes_is_left_to_it(
    tiny_train_config: Callable[..., TrainConfig], copied: Path
) -> None:
    first = files_of(copied)[0]
    first.unlink()
    code = (
        "import sys; from pathlib import Path; from glus.inference.claims import Claims\n"
        "with Claims(Path(sys.argv[1]), '').claimed(1): print('claimed', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(first.parent / ".claims")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        assert fill(cached(tiny_train_config(), copied)) == 1
        other.communicate()
    assert not first.exists()


def test_a_file_system_without_locks_is_named(
    tiny_train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("glus.inference.claims.fcntl.lockf", lockf)
    with pytest.raises(OSError, match=r"cannot be locked .* choose data.feature_cache.folder on a file system"):
        fill(cached(tiny_train_config(), tmp_path, ["clip"]))


def test_the_room_is_printed_and_required(
    tiny_train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached(tiny_train_config(), tmp_path / "features")
    console = Console(record=True, width=120, quiet=False, file=(tmp_path / "printed").open("w"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"0\.0 GB are needed and 0\.0 GB are free; choose another disk"):
        fill(config, console)
    # Six videos of eight frames, float32: CLIP has 4 tokens of 32; SAM2 4 x 16^2, 8 x 8^2 and 32 x 4^2.
    total = 6 * 8 * 4 * (4 * 32 + 4 * 256 + 8 * 64 + 32 * 16)
    assert f"{total / 1e9:.3f} GB in all" in console.export_text()
    assert not files_of(tmp_path)


def test_a_folder_must_be_named(tiny_train_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match=r"data\.feature_cache\.folder is not set"):
        fill(tiny_train_config())


def test_the_tool_needs_no_language_model(tiny_train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    model: ModelConfig = tiny_train_config().model
    assert towers_only(model) == model  # its towers are at random
    torch.manual_seed(1)
    start = build_glus(model)
    start.clip.vision_model.save_pretrained(tmp_path / "clip")
    torch.save({"model": start.segmenter.sam.state_dict()}, tmp_path / "sam2.pt")
    model.clip.weights, model.segmenter.weights = str(tmp_path / "clip"), str(tmp_path / "sam2.pt")
    light = towers_only(model)
    built = build_glus(light)
    assert not list(built.language.llama.model.layers)
    assert feature_keys(built, light, BOTH) == feature_keys(start, model, BOTH)


# -------------------------------------------------------------------------------------------------------- errors


def test_a_missing_video_is_named_before_the_first_step(
    tiny_train_config: Callable[..., TrainConfig], copied: Path
) -> None:
    gone = files_of(copied)[2]
    gone.unlink()
    message = rf"1 of 6 videos .* the first is shapes_train/{gone.stem} .*python tools/cache_features\.py"
    with pytest.raises(FileNotFoundError, match=message):
        build(cached(tiny_train_config(), copied))


def test_a_cache_that_was_never_filled_is_named(tiny_train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no clip features: .*python tools/cache_features\.py"):
        build(cached(tiny_train_config(), tmp_path))


@pytest.mark.parametrize("part", BOTH)
def test_features_of_other_weights_are_refused(
    tiny_train_config: Callable[..., TrainConfig], filled: Path, part: str
) -> None:
    (key,) = (folder.name for folder in (filled / part).iterdir())
    config = cached(tiny_train_config(), filled, [part])
    config.trainer.seed = 1
    with pytest.raises(
        ValueError, match=rf"holds {part} features of key {key}, but this model's .* have key (?!{key})"
    ):
        build(config)


def test_settings_and_precision_make_another_key(tiny_train_config: Callable[..., TrainConfig]) -> None:
    model = tiny_train_config().model
    glus = build_glus(model)
    keys = feature_keys(glus, model, BOTH)
    other_layer = replace(model, clip=replace(model.clip, select_layer=-1))
    assert feature_keys(glus, other_layer, BOTH)["clip"] != keys["clip"]
    other_window = replace(
        model.segmenter, overrides={**model.segmenter.overrides, "image_encoder.trunk.q_stride": [2, 2]}
    )
    assert feature_keys(glus, replace(model, segmenter=other_window), BOTH)["sam2"] != keys["sam2"]
    assert not set(feature_keys(glus.to(torch.bfloat16), model, BOTH).values()) & set(keys.values())


def test_a_truncated_file_is_named(tiny_train_config: Callable[..., TrainConfig], copied: Path) -> None:
    _, mixture, _ = build(cached(tiny_train_config(), copied))
    for file in files_of(copied):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"features \S+\.safetensors do not decode .*python tools/cache_features\.py"):
        mixture[0]


def test_a_frame_that_is_not_cached_is_named(tiny_train_config: Callable[..., TrainConfig], copied: Path) -> None:
    _, mixture, _ = build(cached(tiny_train_config(), copied, ["clip"]))
    frames = FrameStore(tiny_train_config().data.mixture["shapes"].dataset)
    for file in files_of(copied / "clip"):
        FeatureStore(file.parent, frames).write(file.stem, FRAMES[:1], iter([torch.zeros(1, 4, 32)]))
    with pytest.raises(
        ValueError, match=r"frame shapes_train/\S+/0000\d is not in \S+; python tools/cache_features\.py"
    ):
        mixture[0]


def test_a_frame_that_changed_is_named_and_encoded_anew(
    tiny_train_config: Callable[..., TrainConfig], shapes_folder: Path, tmp_path: Path, copied: Path
) -> None:
    config = cached(moved(tiny_train_config(), shapes_folder, tmp_path), copied)
    _, mixture, _ = build(config)
    for picture in (tmp_path / "shapes" / "train" / "JPEGImages").rglob("*.jpg"):
        picture.write_bytes(picture.read_bytes() + b" ")  # after the end of a picture, so that it decodes
    with pytest.raises(ValueError, match=r"frame shapes_train/\S+ is not the one that was encoded"):
        mixture[0]
    assert fill(config) == 0
    assert mixture[0].names


@pytest.mark.parametrize(
    ("part", "trainable", "decay", "message"),
    [
        ("clip", ["clip"], 0.0, r"model\.trainable=.*expected without clip, whose features are cached"),
        ("sam2", ["image_encoder"], 0.0, r"model\.trainable=.*expected without image_encoder"),
        ("sam2", ["mask_decoder"], 0.1, r"trainer\.weight_decay=0\.1: expected 0 where data\.feature_cache\.parts"),
    ],
)
def test_a_tower_that_changes_is_not_cached(
    tiny_train_config: Callable[..., TrainConfig], part: str, trainable: list[str], decay: float, message: str
) -> None:
    config = tiny_train_config()
    model, trainer = replace(config.model, trainable=trainable), replace(config.trainer, weight_decay=decay)
    replace(config, model=model, trainer=trainer)  # fine without a cache
    data = replace(config.data, feature_cache=FeatureCacheConfig("features", [part]))
    with pytest.raises(ValueError, match=message):
        replace(config, model=model, trainer=trainer, data=data)


def test_parts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"data\.feature_cache\.parts=\['llm'\]: expected clip, sam2 or both"):
        FeatureCacheConfig("features", ["llm"])


def moved(config: TrainConfig, shapes_folder: Path, tmp_path: Path) -> TrainConfig:
    """The same config on a copy of the benchmark, for a test to change."""
    shutil.copytree(shapes_folder, tmp_path / "shapes")
    config.data.mixture["shapes"].dataset.root = str(tmp_path / "shapes")
    return config


def last_frame_of_first_video(root: Path) -> Path:
    return sorted(sorted((root / "train" / "JPEGImages").iterdir())[0].iterdir())[-1]
