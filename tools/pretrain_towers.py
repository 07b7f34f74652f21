"""Make what a small GLUS starts from: a tokenizer, a CLIP tower and a SAM2, learned from generated frames.

    python tools/pretrain_towers.py parts=[tokenizer,clip]
    python tools/pretrain_towers.py parts=[sam2]

They are written in the formats of their big sisters (a transformers folder, ``{"model": state dict}``), so that
training loads them through the same code.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from glus.config import PretrainConfig, load_config
from glus.data.tokenization import train_vocabulary
from glus.log import run_info, setup_logging
from glus.models.build import build_segmenter
from glus.models.clip import ClipEncoder, build_vision_tower
from glus.train.towers import draw_scenes, pretrain_clip, pretrain_sam2

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> None:
    """Make the wanted parts, each written when it is done."""
    setup_logging()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    size = config.model.clip.architecture["image_size"]
    scenes = draw_scenes(config.seed, config.num_scenes, config.num_frames, size)
    torch.manual_seed(config.seed)
    if "tokenizer" in config.parts:
        sentences = [sentence.text for scene in scenes for sentence in scene.sentences]
        train_vocabulary(folder / "tokenizer", sentences, config.model.llm.vocab_size - 8)
    if "clip" in config.parts:
        clip = config.model.clip
        encoder = ClipEncoder(build_vision_tower(clip.architecture), clip.select_layer, clip.pool)
        with (folder / "clip.jsonl").open("w") as file:
            report = _reporter("clip", config.clip_steps, file.write)
            pretrain_clip(
                encoder, scenes, config.clip_steps, config.clip_batch_size, config.learning_rate, config.seed, report
            )
        encoder.vision_model.save_pretrained(folder / "clip")
    if "sam2" in config.parts:
        segmenter = build_segmenter(config.model.segmenter)
        with (folder / "sam2.jsonl").open("w") as file:
            report = _reporter("sam2", config.sam2_steps, file.write)
            pretrain_sam2(
                segmenter,
                scenes,
                config.sam2_steps,
                config.sam2_batch_size,
                config.sam2_clip_frames,
                config.learning_rate,
                config.seed,
                report,
            )
        torch.save({"model": segmenter.sam.state_dict()}, folder / "sam2.pt.tmp")
        os.replace(folder / "sam2.pt.tmp", folder / "sam2.pt")
    (folder / f"run_{'_'.join(config.parts)}.json").write_text(json.dumps(run_info(), indent=2) + "\n")


def _reporter(name: str, steps: int, write: Callable[[str], object]) -> Callable[[int, dict[str, float]], None]:
    """Writes running means of a tower's values every 50 steps."""
    means: dict[str, float] = {}
    started = time.monotonic()

    def report(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            means[key] = 0.95 * means.get(key, value) + 0.05 * value
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (time.monotonic() - started) / (step + 1)
            write(json.dumps({"step": step + 1, "seconds_per_step": pace, **means}) + "\n")
            text = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
            log.info("%s step %d/%d  %s  %.2f s/step", name, step + 1, steps, text, pace)

    return report


ConfigStore.instance().store("schema", PretrainConfig)


@hydra.main(version_base="1.3", config_path="../configs", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    try:
        pretrain(load_config(PretrainConfig, cfg))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
