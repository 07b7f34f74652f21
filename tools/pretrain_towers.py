"""Make what a small GLUS starts from: tokenizer, CLIP, SAM2 and LLM, learned from generated scenes.

    python tools/pretrain_towers.py parts=[tokenizer,clip,llm]
    python tools/pretrain_towers.py parts=[sam2]

They are written in the formats of their big sisters (transformers' folders, the LLM with LLaVA's projector inside;
``{"model": state dict}`` for SAM2), so that training loads them through the same code.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from glus.config import PretrainConfig, load_config
from glus.data.chat.llava import ConversationTokenizer, train_vocabulary
from glus.files import write_text
from glus.log import run_info, setup_logging
from glus.models.build import build_segmenter
from glus.models.mllm.llava import ClipEncoder, build_vision_tower
from glus.models.pretrained import build_glus
from glus.models.release_layout import PROJECTOR_PREFIX
from glus.models.weight_files import write_pickle, write_tensors
from glus.shapes.pretrain_clip import pretrain_clip
from glus.shapes.pretrain_labels import draw_scenes
from glus.shapes.pretrain_llm import pretrain_llm
from glus.shapes.pretrain_optimize import Report
from glus.shapes.pretrain_sam2 import pretrain_sam2
from glus.shapes.scene import Scene
from glus.tokens import Vocabulary

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> None:
    """Make the wanted parts, each written when it is done."""
    setup_logging()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    size = config.model.clip.architecture["image_size"]
    scenes = draw_scenes(config.seed, config.num_scenes, config.num_frames, size)
    for part in ("tokenizer", "clip", "llm", "sam2"):
        if part in config.parts:
            torch.manual_seed(config.seed)
            MAKERS[part](config, scenes, folder)
    write_text(folder / f"run_{'_'.join(config.parts)}.json", json.dumps(run_info(), indent=2) + "\n")


def make_tokenizer(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """A SentencePiece vocabulary of the scenes' sentences."""
    sentences = [sentence.text for scene in scenes for sentence in scene.sentences]
    train_vocabulary(folder / "tokenizer", sentences, config.model.llm.vocab_size - 8)


def make_clip(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """A CLIP tower."""
    clip, steps = config.model.clip, config.clip_steps
    encoder = ClipEncoder(build_vision_tower(clip.architecture), clip.select_layer, clip.pool)
    with _reporter("clip", steps, folder) as report:
        pretrain_clip(encoder, scenes, steps, config.clip_batch_size, config.learning_rate, config.seed, report)
    encoder.vision_model.save_pretrained(folder / "clip")


def make_llm(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """An LLM and its projector; the model's config says where the CLIP and the tokenizer lie."""
    model, steps, batch_size = copy.deepcopy(config.model), config.llm_steps, config.llm_batch_size
    model.segmenter.weights = model.llm.weights = None
    model.llm.lora_rank, model.trainable = 0, ["projector", "llm"]  # LoRA comes on top of what is made here
    glus = build_glus(model)
    tokenizer = ConversationTokenizer(Vocabulary(model.llm.tokenizer), glus.tokens_per_frame)
    with _reporter("llm", steps, folder) as report:
        pretrain_llm(
            glus, tokenizer, config.frames, scenes, steps, batch_size, config.learning_rate, config.seed, report
        )
    projector = {f"{PROJECTOR_PREFIX}{name}": tensor for name, tensor in glus.projector.state_dict().items()}
    tensors = {**glus.language.llama.state_dict(), **projector}
    (folder / "llm").mkdir(exist_ok=True)
    write_tensors(folder / "llm" / "model.safetensors", tensors, {})


def make_sam2(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """A SAM2."""
    segmenter, steps = build_segmenter(config.model.segmenter), config.sam2_steps
    batch_size, num_frames = config.sam2_batch_size, config.sam2_clip_frames
    with _reporter("sam2", steps, folder) as report:
        pretrain_sam2(segmenter, scenes, steps, batch_size, num_frames, config.learning_rate, config.seed, report)
    write_pickle(folder / "sam2.pt", {"model": segmenter.sam.state_dict()})


MAKERS = {"tokenizer": make_tokenizer, "clip": make_clip, "llm": make_llm, "sam2": make_sam2}


@contextmanager
def _reporter(name: str, steps: int, folder: Path) -> Iterator[Report]:
    """Writes running means of a tower's values every 50 steps to the log and to ``<name>.jsonl``."""
    means: dict[str, float] = {}
    started = time.monotonic()
    with (folder / f"{name}.jsonl").open("w") as file:

        def report(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                means[key] = 0.95 * means.get(key, value) + 0.05 * value
            if (step + 1) % 50 == 0 or step + 1 == steps:
                pace = (time.monotonic() - started) / (step + 1)
                file.write(json.dumps({"step": step + 1, "seconds_per_step": pace, **means}) + "\n")
                file.flush()
                text = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
                log.info("%s step %d/%d  %s  %.2f s/step", name, step + 1, steps, text, pace)

        yield report


ConfigStore.instance().store("schema", PretrainConfig)


@hydra.main(version_base="1.3", config_path="../configs", config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    try:
        pretrain(load_config(PretrainConfig, cfg))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
