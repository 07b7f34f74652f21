"""Every file of ``configs/dataset`` reads the layout it is meant for, and every training split can be trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import DataConfig, DatasetConfig, FramesConfig, MixtureItem, QuerySampling, TrainConfig, load_config
from glus.data.chat.llava import LlavaChat
from glus.data.loader import build_loader, build_mixture
from glus.models.mllm.llava import clip_crop
from glus.tokens import Vocabulary
from glus.types import Role
from tests.data.test_readers import check_reading
from tests.layouts import SIZE, WRITERS, Written

CLIP = 8


def prepare(frame: np.ndarray, role: Role) -> np.ndarray:
    return clip_crop(frame, CLIP)


CONFIGS = Path(__file__).parents[2] / "configs"
BENCHMARKS = sorted(
    path.stem for path in (CONFIGS / "dataset").glob("*.yaml") if not path.stem.startswith(("shapes", "custom"))
)


def load_train(*overrides: str) -> TrainConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load_config(TrainConfig, compose("train", overrides=["experiment=shapes", *overrides]))


def write(dataset: DatasetConfig, data: Path) -> tuple[DatasetConfig, Written]:
    """Write a dataset's layout to where ``paths.data=data`` has it; its config there."""
    root = data / Path(dataset.root).relative_to("data")
    return replace(dataset, root=str(root)), WRITERS[dataset.layout](root, dataset.split)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_config_reads_its_benchmark(tmp_path: Path, name: str) -> None:
    dataset = load_train(f"dataset@valid={name}").valid
    assert dataset is not None
    assert dataset.name == name.removesuffix("_train")
    here, written = write(dataset, tmp_path)
    check_reading(replace(written, dataset=here))


PICTURES = {"refcoco", "refcoco_plus", "refcocog", "reason_seg"}


@pytest.mark.parametrize("query_sampling", list(QuerySampling))
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.endswith("_train")])
def test_every_training_split_gives_samples(
    tmp_path: Path, tiny_vocabulary: Vocabulary, name: str, query_sampling: QuerySampling
) -> None:
    valid = load_train(f"dataset@valid={name}").valid
    assert valid is not None
    dataset, _ = write(valid, tmp_path)
    frames = FramesConfig(num_context=2, num_query=3, query_sampling=query_sampling)
    data = DataConfig({dataset.name: MixtureItem(dataset)})
    sample = build_mixture(data, frames, LlavaChat(tiny_vocabulary, 4), prepare, seed=0)[0]
    assert all(sentence.startswith(f"{dataset.name}/") for sentence in sample.names)
    assert sample.context_pixels.shape == (2, CLIP, CLIP, 3)
    assert sample.query_frames.shape == (3, *SIZE, 3)
    assert any(masks.any() for masks in sample.target_masks)
    is_still = all(np.array_equal(frame, sample.query_frames[0]) for frame in sample.query_frames)
    assert is_still == (dataset.name in PICTURES)
    if is_still:
        np.testing.assert_array_equal(sample.context_pixels, sample.query_pixels[:2])
        assert all(np.array_equal(masks, masks[[0, 0, 0]]) for masks in sample.target_masks)


def test_a_third_of_the_joint_draws_are_pictures_and_share_batches_with_videos(
    tmp_path: Path, tiny_vocabulary: Vocabulary
) -> None:
    data = load_train("data=refvos_plus_image").data
    for item in data.mixture.values():
        item.dataset, _ = write(item.dataset, tmp_path)
    mixture = build_mixture(data, FramesConfig(2, 3), LlavaChat(tiny_vocabulary, 4), prepare, seed=0)
    is_picture = np.array([dataset.name in PICTURES for dataset in mixture.datasets])
    assert 0.3 < mixture.shares[is_picture].sum() < 0.37
    kinds = [mixture[number].names[0].split("/")[0] in PICTURES for number in range(20)]
    picture, video = kinds.index(True), kinds.index(False)
    batch = next(build_loader(mixture, [[video, picture]], 0, pad_id=0))
    assert [len(video) for video in batch.query_pixels] == [3, 3]
    assert set(batch.video_index.tolist()) == {0, 1}
    assert {masks.shape for masks in batch.target_masks} == {(3, *SIZE)}
