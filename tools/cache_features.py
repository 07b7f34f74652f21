"""Encode every frame of the training videos once, for training runs that read the features instead.

    python tools/cache_features.py experiment=shapes data.feature_cache.folder=outputs/features
    torchrun --nproc_per_node=4 tools/cache_features.py experiment=glus_s data.feature_cache.folder=/fast/features
    python scripts/train.py experiment=shapes data.feature_cache.folder=outputs/features

Takes the overrides of ``scripts/train.py``; ``data.feature_cache.parts=[clip,sam2]`` adds SAM2's features, which need
64 times the room of CLIP's. Says what it will write before it starts. A video's features are there only when they are
complete, so a killed run is continued by the same command, with any number of processes, which share the videos as
they go.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from glus import distributed
from glus.config import ModelConfig, Quantization, SegHeadInit, TrainConfig, load_config
from glus.data.features import FeatureStore, feature_store
from glus.data.frames import FrameStore
from glus.data.loader import training_expressions
from glus.data.transforms import clip_crop
from glus.files import naming_write_errors
from glus.inference.claims import Claims
from glus.log import setup_logging
from glus.models.features import feature_keys
from glus.models.glus import Glus
from glus.models.pretrained import build_glus
from glus.models.weights import Target

log = logging.getLogger(__name__)

FRAMES_AT_ONCE = 8
GB = 10**9
CLAIMS_FILE = ".claims"


@dataclass(frozen=True)
class Split:
    """What is to be cached of one split for one part of the model."""

    part: str
    frames: FrameStore
    store: FeatureStore
    videos: dict[str, tuple[str, ...]]
    """Names of the frames of each video that can be drawn."""

    def missing(self) -> list[str]:
        """Videos that are not cached yet."""
        return [video for video, names in self.videos.items() if not self.store.is_complete(video, names)]


def towers_only(model: ModelConfig) -> ModelConfig:
    """The same towers beside an LLM without layers, which no feature depends on and which may have 13 GB of weights.

    The same config where a tower has no weights of its own: then it comes out of another model, or depends on the
    random numbers that were drawn for the LLM.
    """
    if model.weights or not (model.clip.weights and model.segmenter.weights):
        return model
    llm = replace(
        model.llm,
        architecture={**model.llm.architecture, "num_hidden_layers": 0},
        weights=None,
        lora_rank=0,
        quantization=Quantization.none,
    )
    return replace(model, llm=llm, seg_head_init=SegHeadInit.random, trainable=[])


def encode(glus: Glus, part: str, frames_FHW3: np.ndarray) -> torch.Tensor:
    """Features (F, ...) of frames, on the CPU."""
    device = glus.projector.weight.device
    with torch.no_grad():
        if part == "clip":
            crops = np.stack([clip_crop(frame, glus.clip.image_size) for frame in frames_FHW3])
            return glus.clip(torch.from_numpy(crops).permute(0, 3, 1, 2).to(device)).cpu()
        images = glus.segmenter.prepare_frames(torch.from_numpy(frames_FHW3).to(device))
        return glus.segmenter.encode_frames(images).flat().cpu()


def encode_video(glus: Glus, split: Split, video: str) -> Iterator[torch.Tensor]:
    """Features of a video's frames in order, some at a time.

    Raises:
        FileNotFoundError, ValueError: a frame is missing, does not decode, or has another size than its neighbours.
    """
    names = split.videos[video]
    for start in range(0, len(names), FRAMES_AT_ONCE):
        frames = [split.frames.read(video, name) for name in names[start : start + FRAMES_AT_ONCE]]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(f"the frames of {split.frames.name}/{video} differ in size; expected one size per video")
        yield encode(glus, split.part, np.stack(frames))


def find_splits(config: TrainConfig, keys: dict[str, str]) -> list[Split]:
    """Every split of the mixture, for each part that is cached.

    Raises:
        FileNotFoundError, ValueError: a split is missing or malformed.
    """
    splits = []
    for item in config.data.mixture.values():
        frames = FrameStore(item.dataset)
        expressions = training_expressions(item.dataset, config.frames.num_query)
        videos = {expression.video: expression.frames for expression in expressions}
        for part, key in keys.items():
            splits.append(Split(part, frames, feature_store(config.data.feature_cache, part, key, frames), videos))
    return splits


def check_room(glus: Glus, splits: list[Split], folder: Path, console: Console) -> None:
    """Print what will be written.

    Raises:
        OSError: there is less room.
    """
    frame = np.zeros((1, 32, 32, 3), np.uint8)
    sizes = {split.part: encode(glus, split.part, frame)[0].nbytes for split in splits}
    table = Table("dataset", "part", title=f"features to be written into {folder}")
    for column in ("videos", "of", "frames", "GB"):
        table.add_column(column, justify="right")
    total = 0
    for split in splits:
        missing = split.missing()
        frames = sum(len(split.videos[video]) for video in missing)
        total += frames * sizes[split.part]
        numbers = f"{len(missing):,}", f"{len(split.videos):,}", f"{frames:,}", f"{frames * sizes[split.part] / GB:.3f}"
        table.add_row(split.frames.name, split.part, *numbers)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    console.print(table)
    console.print(f"{total / GB:.3f} GB in all; {free / GB:,.1f} GB are free there.")
    if total > free:
        raise OSError(
            f"data.feature_cache.folder={folder}: {total / GB:,.1f} GB are needed and {free / GB:,.1f} GB are free; "
            "choose another disk, or data.feature_cache.parts=[clip]"
        )


def fill(glus: Glus, split: Split) -> int:
    """Encode the videos that no other process has; returns how many of the split are missing still."""
    file = split.store.folder / CLAIMS_FILE
    with naming_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        claims = Claims(file, "data.feature_cache.folder")
    for number, video in enumerate(sorted(split.videos), start=1):
        with claims.claimed(number) as is_mine:
            names = split.videos[video]
            if is_mine and not split.store.is_complete(video, names):
                with naming_write_errors(split.store.path(video)):
                    split.store.write(video, names, encode_video(glus, split, video))
                log.info("%s of %s: %s, %d of %d", split.part, split.frames.name, video, number, len(split.videos))
    return len(split.missing())


def cache_features(config: TrainConfig, console: Console) -> int:
    """Write what is missing; returns the number of videos that other processes still have to write.

    Raises:
        FileNotFoundError, ValueError: data or weights are missing or damaged, or no folder is named.
        OSError: the folder cannot be written, or has too little room.
    """
    cache = config.data.feature_cache
    if not cache.folder:
        raise ValueError("data.feature_cache.folder is not set: name the folder that is to hold the features")
    torch.manual_seed(config.trainer.seed)  # as in training, for towers at random
    model = towers_only(config.model)
    glus = build_glus(model, target=Target(distributed.use_device())).eval()
    keys = feature_keys(glus, model, cache.used_parts())
    splits = find_splits(config, keys)
    check_room(glus, splits, Path(cache.folder), console)
    return sum(fill(glus, split) for split in splits)


ConfigStore.instance().store("schema", TrainConfig)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point; takes the overrides of ``scripts/train.py``."""
    setup_logging()
    console = Console(width=None if sys.stdout.isatty() else 120, quiet=distributed.rank() != 0)
    try:
        config = load_config(TrainConfig, cfg)
        missing = cache_features(config, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    others = f"{missing} videos are being encoded by other processes" if missing else "the cache is complete"
    print(f"rank {distributed.rank()} of {distributed.world_size()} is through; {others}")


if __name__ == "__main__":
    main()
