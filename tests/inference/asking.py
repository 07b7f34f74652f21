"""What the predictor is asked in tests: sentences about random frames, of a model that answers as wanted."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from glus.config import FramesConfig, InferenceConfig
from glus.data.chat.llava import LlavaChat
from glus.inference.predictor import VideoPredictor
from glus.models.pretrained import LoadedModel

TEXTS = ["the red circle", "The circle moving left to the far corner.", "all shapes"]
SIZE = (40, 56)


class ArrayVideo:
    """Random frames; counts how often each is read."""

    reads_in_parallel = True

    def __init__(self, num_frames: int, seed: int = 0):
        self.names = [str(index) for index in range(num_frames)]
        self.reads = [0] * num_frames
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (num_frames, 5, 7, 3), dtype=np.uint8)
        self._frames = coarse.repeat(8, axis=1).repeat(8, axis=2)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        self.reads[index] += 1
        return self._frames[index]


def answering(model: LoadedModel, seg: bool = True) -> LoadedModel:
    """The model, made to always answer with [SEG], or with something else."""
    glus = copy.deepcopy(model.glus)
    logits = glus.mllm.decoder.logits
    token = model.vocabulary.seg_id if seg else model.vocabulary.eos_id
    bias = torch.nn.functional.one_hot(torch.tensor(token), model.config.model.llm.vocab_size) * 1e4
    glus.mllm.decoder.logits = lambda states: logits(states) + bias
    return replace(model, glus=glus)


def answering_sometimes(model: LoadedModel) -> LoadedModel:
    """The model, made to answer some prompts with [SEG] and others not, as their state's first channel has it."""
    sometimes = answering(model)
    logits, seg_id = sometimes.glus.mllm.decoder.logits, model.vocabulary.seg_id
    one_hot = torch.nn.functional.one_hot(torch.tensor(seg_id), model.config.model.llm.vocab_size) * 2e4
    sometimes.glus.mllm.decoder.logits = lambda states: logits(states) - one_hot * ((states[..., :1] * 50).sin() < 0)
    return sometimes


def predictor(model: LoadedModel, frames: FramesConfig, **inference: object) -> VideoPredictor:
    tokenizer = LlavaChat(model.vocabulary, model.glus.mllm.tokens_per_frame)
    return VideoPredictor(model.glus, tokenizer, frames, InferenceConfig(**inference))
