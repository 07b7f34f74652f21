"""The plain procedures of prediction and training, and the models and videos that ours is compared with them on.

Same weights, same result, nothing shared. What benchmarks know of the network's inside is in this file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from glus import distributed
from glus.batch import Batch, GlusOutput, TokenRows, TrainSample
from glus.config import FramesConfig, InferenceConfig, ModelConfig, load_config
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import separate_rows
from glus.data.dataset import collate, make_sample
from glus.data.frames import VideoSource
from glus.data.sampling import context_indices_eval, draw_turns
from glus.files import PROJECT
from glus.inference.asking import Pass
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.video_run import StageClock
from glus.models.build import build_random
from glus.models.glus import Glus, segment_step, upsample_masks
from glus.models.mllm import Mllm
from glus.models.mllm.llava import llava_of
from glus.models.segmenter.sam2 import Sam2Segmenter
from glus.shapes.scene import Scene, generate_scene
from glus.tokens import Vocabulary

SHIPPED_MODEL = PROJECT / "assets" / "glus_shapes"


class BenchmarkVideo:
    """Frames that cost nothing to read: those of a generated scene, enlarged, again and again."""

    reads_in_parallel = True

    def __init__(self, num_frames: int, height: int, width: int, seed: int = 0):
        self.scene = generate_scene(np.random.default_rng(seed), num_frames=16, size=128)
        self.names = [f"{index:05d}" for index in range(num_frames)]
        self._rows = np.arange(height) * 128 // height
        self._columns = np.arange(width) * 128 // width

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return np.ascontiguousarray(self.scene.frames_THW3[index % 16][self._rows][:, self._columns])

    def texts(self, count: int) -> list[str]:
        """Sentences of the scene, repeated if need be."""
        texts = [sentence.text for sentence in self.scene.sentences]
        return [texts[number % len(texts)] for number in range(count)]


class StandInVocabulary:
    """As many tokens as LLaMA's vocabulary gives English text, about one for four letters, for random weights."""

    bos_id, eos_id, pad_id = 1, 2, 0
    image_start_id, image_end_id, seg_id, size = 32001, 32002, 32003, 32004

    def encode(self, text: str) -> list[int]:
        """Ids that depend on the letters alone; a trailing space is a token of its own, as in LLaMA's."""
        pieces = [text.rstrip()[start : start + 4] for start in range(0, len(text.rstrip()), 4)]
        pieces += [" "] * text.endswith(" ")
        return [3 + sum(ord(letter) * 31**place for place, letter in enumerate(piece)) % 31000 for piece in pieces]


def stand_in_tokenizer(tokens_per_frame: int) -> LlavaChat:
    """One that gives a model prompts as long as LLaMA's."""
    vocabulary: Any = StandInVocabulary()
    return LlavaChat(vocabulary, tokens_per_frame)


def model_config(size: str) -> ModelConfig:
    """``configs/model/<size>.yaml``, its files looked for in the current folder."""
    model = OmegaConf.load(PROJECT / "configs" / "model" / f"{size}.yaml")
    entry = OmegaConf.create({"paths": {"weights": "."}, "model": model})
    OmegaConf.resolve(entry)
    return load_config(ModelConfig, entry.model)


def build_predictor(size: str) -> VideoPredictor:
    """The shipped model (``tiny``), or one of ``configs/model`` with random weights, which uses every state as if it
    were [SEG]'s."""
    if size == "tiny":
        return load_predictor(SHIPPED_MODEL)[0]
    torch.manual_seed(0)
    glus = build_random(model_config(size), distributed.device()).eval()
    tokenizer = stand_in_tokenizer(llava_of(glus).tokens_per_frame)
    return VideoPredictor(glus, tokenizer, FramesConfig(), InferenceConfig(force_seg=True))


def build_training(size: str, device: torch.device) -> tuple[Glus, LlavaChat]:
    """A model of ``configs/model`` with random weights, in training mode but without dropout."""
    glus = build_random(model_config(size), device).train()
    silence_dropout(glus)
    if size == "glus_tiny":
        return glus, LlavaChat(Vocabulary(SHIPPED_MODEL), llava_of(glus).tokens_per_frame)
    return glus, stand_in_tokenizer(llava_of(glus).tokens_per_frame)


def silence_dropout(module: nn.Module) -> None:
    """Set the probability of every dropout to 0: of layers, and in the fields where attention layers keep theirs."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout_p", "attention_dropout"):
            if hasattr(part, name):
                setattr(part, name, 0.0)


# ----------------------------------------------------------------------------------------------- prediction


@torch.inference_mode()
def segment_plainly(
    predictor: VideoPredictor, video: VideoSource, text: str, start: int = 0, direction: int = 1
) -> Iterator[tuple[torch.Tensor, bool]]:
    """The plain procedure for one sentence, from ``start`` to an end of the video.

    Yields:
        Mask logits (H, W) at the frame's size, and whether [SEG] was the most likely token (else it is not segmented).
    """
    glus, settings, device = predictor.glus.eval(), predictor.inference, predictor.device
    num_context, vocabulary = predictor.frames.num_context, predictor.chat.vocabulary
    bank = glus.memory_bank(settings.memory_stride)
    one = Pass({0: start}, len(video), direction)
    for step, frame in enumerate(one.order):
        window = one.window(0, step, predictor.frames, settings.window)
        pixels = [video.read(index) for index in (*context_indices_eval(len(video), num_context), *window)]
        shown = torch.from_numpy(np.stack([glus.mllm.prepare(frame_HW3) for frame_HW3 in pixels])).to(device)
        tokens_MD = glus.mllm.see(shown.permute(0, 3, 1, 2)).flatten(0, 1)
        prompt = predictor.chat.window(text, num_context, len(window), settings.trailing_space)
        states_LD = all_states(glus, separate_rows([prompt], vocabulary.pad_id).to(device), tokens_MD)
        has_seg = int(glus.mllm.decoder.logits(states_LD)[-1].argmax()) == vocabulary.seg_id
        image = glus.segmenter.prepare_frames(torch.from_numpy(video.read(frame)).to(device)[None])
        features = glus.segmenter.encode_frames(image)
        size = pixels[-1].shape[:2]
        if has_seg or settings.force_seg:
            prompt_1C, fallback = glus.seg_head(states_LD[-1:]), glus.segmenter.multimask_fallback
            _, decoded = segment_step(glus.segmenter, bank, {0: step}, features, prompt_1C, fallback=fallback)
            yield upsample_masks(decoded.logits_Nmm, size)[0], has_seg
        else:
            yield torch.full(size, -torch.inf, device=device), has_seg


def all_states(glus: Glus, rows: TokenRows, visual_TD: torch.Tensor) -> torch.Tensor:
    """(B * L, D): the state of every token of rows, as a plain forward pass has them."""
    everywhere = torch.arange(rows.input_ids_BL.numel(), device=visual_TD.device)
    states_RD, _ = glus.mllm.states(replace(rows, reads_R=everywhere), visual_TD)
    return states_RD


def token_bound(predictor: VideoPredictor, texts: Sequence[str], num_frames: int) -> int:
    """LLM tokens if only the context prefix were shared: prefix + sum of (window - prefix)."""
    tokenizer, frames, inference = predictor.chat, predictor.frames, predictor.inference
    prefix, one = len(tokenizer.opening(frames.num_context)), Pass({0: 0}, num_frames, 1)
    sizes = Counter(len(one.window(0, step, frames, inference.window)) for step in range(num_frames))
    lengths = (
        count * (len(tokenizer.window(text, frames.num_context, size, inference.trailing_space).input_ids) - prefix)
        for text in texts
        for size, count in sizes.items()
    )
    return prefix + sum(lengths)


# ------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device, in the form of either procedure."""

    batch: Batch
    frames: list[torch.Tensor]
    """B tensors (K + Q, H, W, 3) uint8 on the CPU."""
    rows: TokenRows
    """Conversations in rows of their own."""


def scene_sample(scene: Scene, num_context: int, tokenizer: LlavaChat, mllm: Mllm) -> TrainSample:
    """All sentences of a scene, whose first frames are context."""
    context, query = scene.frames_THW3[:num_context], scene.frames_THW3[num_context:]
    rng, conversations, masks = np.random.default_rng(0), [], []
    for sentence in scene.sentences:
        turns = draw_turns(sentence.text, len(query), rng)
        conversations.append(tokenizer.train(turns, num_context, sentence.text))
        masks.append(np.any(scene.masks_OTHW[[*sentence.object_ids], num_context:], 0).view(np.uint8))
    return make_sample(mllm.prepare, list(context), list(query), conversations, masks)


def split_sample(sample: TrainSample) -> list[TrainSample]:
    """Each sentence as a sample of its own."""
    rows = zip(sample.conversations, sample.target_masks, strict=True)
    return [replace(sample, conversations=[asked], target_masks=[masks]) for asked, masks in rows]


def make_inputs(
    scenes: Sequence[Scene], num_context: int, tokenizer: LlavaChat, mllm: Mllm, device: torch.device
) -> tuple[Inputs, list[Inputs]]:
    """All sentences of some scenes as one micro-batch, and each sentence as one of its own."""
    pad_id = tokenizer.vocabulary.pad_id

    def make(chosen: Sequence[tuple[Scene, TrainSample]]) -> Inputs:
        rows = separate_rows([one for _, sample in chosen for one in sample.conversations], pad_id)
        frames = [torch.from_numpy(scene.frames_THW3) for scene, _ in chosen]
        return Inputs(collate([sample for _, sample in chosen], pad_id).to(device), frames, rows.to(device))

    everything = [(scene, scene_sample(scene, num_context, tokenizer, mllm)) for scene in scenes]
    return make(everything), [make([(scene, one)]) for scene, sample in everything for one in split_sample(sample)]


def count_tokens(inputs: Sequence[Inputs]) -> int:
    """Tokens that the LLM sees in ours, padding not counted."""
    paths = [one.batch.rows.paths_NC for one in inputs]
    return sum(len(path_NC.unique()) for path_NC in paths if path_NC is not None)


def released_forward(glus: Glus, inputs: Sequence[Inputs]) -> GlusOutput:
    """A forward pass as the released GLUS computes it: SAM2's features of a query frame are shared, no more. Plain, if
    each of the inputs is one expression alone."""
    outputs = [_released_output(glus, one) for one in inputs]
    return GlusOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def _released_output(glus: Glus, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = inputs.batch
    pixels = [torch.cat(frames) for frames in zip(batch.context_pixels, batch.query_pixels, strict=True)]
    visual = [glus.mllm.see(pixels[video]).flatten(0, 1) for video in batch.video_index.tolist()]
    states_RD = all_states(glus, inputs.rows, torch.cat(visual))
    logits_RV, reads_NQ = glus.mllm.decoder.logits(states_RD), inputs.rows.reads_R.unflatten(0, (len(visual), -1))
    embeds_NQC = glus.seg_head(states_RD[reads_NQ])
    masks = [
        _released_masks(glus, frames, embeds_NQC[batch.video_index == video])
        for video, frames in enumerate(inputs.frames)
    ]
    return logits_RV[reads_NQ], embeds_NQC, torch.cat(masks)


def _released_masks(glus: Glus, frames_FHWC: torch.Tensor, embeds_EQC: torch.Tensor) -> torch.Tensor:
    """Mask logits (E, Q, m, m) of the last Q frames of a video."""
    num_rows, num_query = embeds_EQC.shape[:2]
    images = torch.cat([glus.segmenter.prepare_frames(frame[None]) for frame in frames_FHWC]).to(embeds_EQC.device)
    bank, masks = glus.memory_bank(), []
    for q in range(num_query):
        frame = glus.segmenter.encode_frames(images[q - num_query, None]).rows([0] * num_rows)
        _, decoded = segment_step(glus.segmenter, bank, dict.fromkeys(range(num_rows), q), frame, embeds_EQC[:, q])
        masks.append(decoded.logits_Nmm)
    return torch.stack(masks, dim=1)


# ------------------------------------------------------------------------------------------------- counting


@contextmanager
def counted(glus: Glus) -> Iterator[Counter[str]]:
    """Count what the modules of a model are asked to do while the context lasts."""
    counts: Counter[str] = Counter()
    llava, segmenter = llava_of(glus), glus.segmenter
    assert isinstance(segmenter, Sam2Segmenter)
    llama, sam = llava.llama, segmenter.sam
    first_norm, last_mlp = llama.model.layers[0].input_layernorm, llama.model.layers[-1].mlp.gate_proj

    watched: dict[str, tuple[nn.Module, Callable[[torch.Tensor], int]]] = {
        "CLIP images": (llava.clip, len),
        "CLIP input bytes": (llava.clip, lambda tensor: tensor.nbytes),
        "SAM2 images": (sam.image_encoder, len),
        "LLM tokens": (first_norm, lambda tensor: tensor.shape[:-1].numel()),
        "LLM calls": (first_norm, lambda _: 1),
        "LLM last MLP tokens": (last_mlp, lambda tensor: tensor.shape[:-1].numel()),
        "LLM head tokens": (llama.lm_head, lambda tensor: tensor.shape[:-1].numel()),
        "memory attention calls": (sam.memory_attention.norm, lambda _: 1),
        "memory encoder calls": (sam.memory_encoder, lambda _: 1),
    }

    def count(name: str, amount: Callable[[torch.Tensor], int], _: nn.Module, arguments: tuple[Any, ...]) -> None:
        counts[name] += amount(arguments[0])

    with ExitStack() as stack:
        for name, (module, amount) in watched.items():
            stack.callback(module.register_forward_pre_hook(partial(count, name, amount)).remove)
        yield counts


@contextmanager
def timed_verbs(glus: Glus, clock: StageClock) -> Iterator[None]:
    """Time the model's verbs while the context lasts."""
    verbs: list[tuple[Any, str, str]] = [(glus.mllm, "see", "vision tower")]
    verbs += [(glus.mllm.decoder, name, "LLM") for name in ("states", "logits")]
    verbs += [(glus.segmenter, "prepare_frames", "SAM2 resize"), (glus.segmenter, "encode_frames", "SAM2 encoder")]
    verbs += [(glus.segmenter, name, "memory and masks") for name in ("condition", "decode", "memorize")]
    with ExitStack() as stack:
        for owner, name, label in verbs:
            timed = clock.stage(label)(getattr(owner, name))  # a context manager of contextlib decorates, too
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield
