"""Make what a small GLUS starts from: tokenizer, CLIP, SAM2 and LLM, learned from generated scenes.

    python tools/pretrain_towers.py parts=[tokenizer,clip,llm]
    python tools/pretrain_towers.py parts=[sam2]
    python tools/pretrain_towers.py parts=[tokenizer,mllm] model=glus_qwen3_vl_tiny output=weights/shapes_qwen3_vl

The third makes an MLLM of another family, whose vision tower and LLM come in one folder; SAM2 is the same.

They are written in the formats of their big sisters (transformers' folders, the LLM with LLaVA's projector inside;
``{"model": state dict}`` for SAM2), so that training loads them through the same code.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glus.config import ModelConfig, PretrainConfig, QuerySampling, SegState
from glus.config.jobs import Jobs
from glus.data.chat import Chat
from glus.data.chat.chatml import train_json_vocabulary
from glus.data.chat.llava import train_vocabulary
from glus.files import write_text
from glus.inference.predictor import chat_of
from glus.log import run_info, setup_logging
from glus.models.build import build_segmenter
from glus.models.glus import Glus
from glus.models.mllm import Mllm
from glus.models.mllm.adapters import second_names
from glus.models.mllm.llava import ClipEncoder, build_vision_tower, llava_of
from glus.models.pretrained import build_glus
from glus.models.published import save_published
from glus.models.release_layout import PROJECTOR_PREFIX
from glus.models.weight_files import write_pickle, write_tensors
from glus.shapes.pretrain import LlmTower, Sam2Tower, Tower, VisionTower, pretrain
from glus.shapes.scene import Scene, draw_scenes, exchange
from glus.tokens import JsonVocabulary, Vocabulary

log = logging.getLogger(__name__)


def pretrain_towers(config: PretrainConfig) -> None:
    """Make the wanted parts, each written when it is done."""
    setup_logging()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    size = config.model.clip.architecture["image_size"]
    own = {"clip": make_clip, "llm": make_llm} if config.model.family == "llava" else {"mllm": make_mllm}
    makers = {"tokenizer": make_tokenizer, **own, "sam2": make_sam2}
    parts = list(makers) if config.parts is None else config.parts
    unknown = sorted(set(parts) - makers.keys())
    if unknown:
        raise ValueError(f"parts={parts}: a model of the family {config.model.family} has {', '.join(makers)}")
    scenes = draw_scenes(config.seed, config.num_scenes, config.num_frames, size)
    if config.is_exchanged:
        scenes = [exchange(scene, index) for index, scene in enumerate(scenes)]
    for part, make in makers.items():
        if part in parts:
            torch.manual_seed(config.seed)
            make(config, scenes, folder)
    write_text(folder / f"run_{'_'.join(parts)}.json", json.dumps(run_info(), indent=2) + "\n")


def make_tokenizer(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """A vocabulary of the scenes' sentences, in the form of the family."""
    sentences = [sentence.text for scene in scenes for sentence in scene.sentences]
    if config.model.family == "llava":
        train_vocabulary(folder / "tokenizer", sentences, config.model.llm.vocab_size - 8)
    else:
        train_json_vocabulary(folder / "tokenizer", sentences, config.model.llm.vocab_size - 1)


def make_clip(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """A CLIP tower."""
    clip = config.model.clip
    encoder = ClipEncoder(build_vision_tower(clip.architecture), clip.select_layer, clip.pool)
    _train("clip", VisionTower(encoder, scenes, config.clip_batch_size), config.clip_steps, config, folder)
    encoder.vision_model.save_pretrained(folder / "clip")


def make_llm(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """An LLM and its projector; the model's config says where the CLIP and the tokenizer lie."""
    glus = build_to_learn(config.model, ["projector", "llm"])
    mllm, chat = llava_of(glus), chat_of(glus, Vocabulary(config.model.llm.tokenizer))
    _train_llm(mllm, chat, config, scenes, folder)
    projector = {f"{PROJECTOR_PREFIX}{name}": tensor for name, tensor in mllm.projector.state_dict().items()}
    write_tensors(folder / "llm" / "model.safetensors", {**mllm.llama.state_dict(), **projector}, {})


def build_to_learn(config: ModelConfig, trainable: list[str]) -> Glus:
    """A network whose LLM is at random and learns to be asked by the state before [SEG], whichever the model reads."""
    model = copy.deepcopy(config)
    model.segmenter.weights = model.llm.weights = None
    model.llm.lora_rank, model.trainable = 0, trainable  # LoRA comes on top of what is made here
    model.seg_state = SegState.predicting
    return build_glus(model)


def _train_llm(mllm: Mllm, chat: Chat, config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """On the method's variants: both kinds of frames, no context, and no consecutive query frames."""
    frames = config.frames
    layouts = [frames, replace(frames, num_context=0), replace(frames, query_sampling=QuerySampling.uniform)]
    tower = LlmTower(mllm, chat, layouts, scenes, config.llm_batch_size)
    _train("llm", tower, config.llm_steps, config, folder)


def make_mllm(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """An MLLM of a family that comes in one folder; the model's config says where the tokenizer lies."""
    glus, vocabulary = build_to_learn(config.model, ["llm"]), JsonVocabulary(config.model.llm.tokenizer)
    mllm, output = glus.mllm, folder / "mllm"
    _train("vision", VisionTower(mllm, scenes, config.clip_batch_size), config.clip_steps, config, folder)
    _train_llm(mllm, chat_of(glus, vocabulary), config, scenes, folder)
    if output.exists():
        shutil.rmtree(output)
    again = second_names(glus)
    tensors = {name: value for name, value in glus.state_dict().items() if name not in again}
    save_published(output, mllm, tensors, vocabulary, config.model.llm.tied, sys.maxsize)


def make_sam2(config: PretrainConfig, scenes: list[Scene], folder: Path) -> None:
    """A SAM2."""
    segmenter: Any = build_segmenter(config.model.segmenter)
    tower = Sam2Tower(segmenter, scenes, config.sam2_batch_size, config.sam2_clip_frames)
    _train("sam2", tower, config.sam2_steps, config, folder)
    write_pickle(folder / "sam2.pt", {"model": segmenter.sam.state_dict()})


def _train(name: str, tower: Tower, steps: int, config: PretrainConfig, folder: Path) -> None:
    """Running means of what the tower reports go to the log and to ``<name>.jsonl`` every 50 steps."""
    means: dict[str, float] = {}
    started = time.monotonic()
    with (folder / f"{name}.jsonl").open("w") as file:
        for step, values in enumerate(pretrain(tower, steps, config.learning_rate, config.seed), start=1):
            known = {key: value for key, value in values.items() if not math.isnan(value)}
            means |= {key: 0.95 * means.get(key, value) + 0.05 * value for key, value in known.items()}
            if step % 50 == 0 or step == steps:
                pace = (time.monotonic() - started) / step
                file.write(json.dumps({"step": step, "seconds_per_step": pace, **means}) + "\n")
                file.flush()
                text = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
                log.info("%s step %d/%d  %s  %.2f s/step", name, step, steps, text, pace)


if __name__ == "__main__":
    Jobs("pretrain", PretrainConfig, "output").start(pretrain_towers)
