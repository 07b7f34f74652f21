"""The plain procedures of prediction and training, and the models and videos that ours is compared with them on.

Same weights, same result, nothing shared. What benchmarks know of the network's inside is in this file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from glus.data.dataset import collate
from glus.data.frames import VideoSource
from glus.data.sampling import context_indices_eval, draw_turns
from glus.inference.asking import Pass
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.models.build import build_random
from glus.models.glus import Glus, segment_step, upsample_masks
from glus.models.mllm.llava import llava_of
from glus.models.segmenter.sam2 import Sam2Segmenter
from glus.shapes.scene import Scene, generate_scene
from glus.tokens import Vocabulary
from glus.types import ObjectKey
from tools.benchmarks.measuring import ROOT, synchronize

Prepare = Callable[[np.ndarray], np.ndarray]
"""``Mllm.prepare``."""
SHIPPED = ROOT / "assets" / "glus_shapes"


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


def stand_in_tokenizer(glus: Glus) -> LlavaChat:
    """One that gives a model prompts as long as LLaMA's."""
    vocabulary: Any = StandInVocabulary()
    return LlavaChat(vocabulary, llava_of(glus).tokens_per_frame)


def model_config(size: str) -> ModelConfig:
    """``configs/model/<size>.yaml``, its files looked for in the current folder."""
    entry = OmegaConf.create({"paths": {"weights": "."}, "model": OmegaConf.load(ROOT / f"configs/model/{size}.yaml")})
    OmegaConf.resolve(entry)
    return load_config(ModelConfig, entry.model)


def build_predictor(size: str) -> VideoPredictor:
    """The shipped model (``tiny``), or one of ``configs/model`` with random weights, which uses every state as if it
    were [SEG]'s."""
    if size == "tiny":
        return load_predictor(SHIPPED)[0]
    torch.manual_seed(0)
    glus = build_random(model_config(size), distributed.device()).eval()
    return VideoPredictor(glus, stand_in_tokenizer(glus), FramesConfig(), InferenceConfig(force_seg=True))


def build_training(size: str, device: torch.device) -> tuple[Glus, LlavaChat]:
    """A model of ``configs/model`` with random weights, in training mode but without dropout."""
    config = model_config(size)
    config.llm.lora_dropout = 0.0
    glus = build_random(config, device).train()
    for module in glus.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):  # SAM2's attention keeps its own
            module.dropout_p = 0.0  # type: ignore[assignment]
    if size == "glus_tiny":
        return glus, LlavaChat(Vocabulary(SHIPPED), llava_of(glus).tokens_per_frame)
    return glus, stand_in_tokenizer(glus)


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
            logits_1mm = segment_step(glus.segmenter, bank, {0: step}, features, prompt_1C, fallback=fallback)
            yield upsample_masks(logits_1mm, size)[0], has_seg
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


def make_sample(
    scene: Scene, video: int, rows: Sequence[int], num_context: int, tokenizer: LlavaChat, prepare: Prepare
) -> TrainSample:
    """Some sentences of a scene, whose first frames are context; a sentence is asked for the same way in any sample."""
    query, count = slice(num_context, None), len(scene.frames_THW3) - num_context
    pixels = np.stack([prepare(frame) for frame in scene.frames_THW3])
    names = [f"shapes/{video}/{row}" for row in rows]
    turns = [draw_turns(scene.sentences[row].text, count, np.random.default_rng((video, row))) for row in rows]
    targets = [scene.masks_OTHW[list(scene.sentences[row].object_ids), query].any(0) for row in rows]
    return TrainSample(
        context_pixels=pixels[:num_context],
        query_pixels=pixels[query],
        query_frames=scene.frames_THW3[query],
        conversations=[tokenizer.train(one, num_context, name) for one, name in zip(turns, names, strict=True)],
        target_masks=[np.asarray(masks, np.uint8) for masks in targets],
        object_keys=[
            [ObjectKey("shapes", str(video), name, str(q), frozenset()) for q in range(count)] for name in names
        ],
        names=names,
    )


def make_inputs(
    scenes: Sequence[Scene], num_context: int, tokenizer: LlavaChat, prepare: Prepare, device: torch.device
) -> tuple[Inputs, list[Inputs]]:
    """All sentences of some scenes as one micro-batch, and each sentence as one of its own."""
    pad_id = tokenizer.vocabulary.pad_id

    def make(chosen: Sequence[tuple[int, Sequence[int]]]) -> Inputs:
        samples = [make_sample(scenes[video], video, rows, num_context, tokenizer, prepare) for video, rows in chosen]
        rows = separate_rows([one for sample in samples for one in sample.conversations], pad_id)
        frames = [torch.from_numpy(scenes[video].frames_THW3) for video, _ in chosen]
        return Inputs(collate(samples, pad_id).to(device), frames, rows.to(device))

    everything = [(video, range(len(scene.sentences))) for video, scene in enumerate(scenes)]
    return make(everything), [make([(video, [row])]) for video, rows in everything for row in rows]


def count_tokens(inputs: Sequence[Inputs]) -> int:
    """Tokens that the LLM sees in ours, padding not counted."""
    paths = [one.batch.rows.paths_NC for one in inputs]
    return sum(len(path_NC.unique()) for path_NC in paths if path_NC is not None)


def shared_forward(glus: Glus, inputs: Sequence[Inputs]) -> GlusOutput:
    """What training runs, on a single batch."""
    output: GlusOutput = glus(inputs[0].batch)
    return output


def released_forward(glus: Glus, inputs: Sequence[Inputs]) -> GlusOutput:
    """The same as the released GLUS computes it: SAM2's features of a query frame are shared, no more. Plain, if each
    of the inputs is one expression alone."""
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
        masks.append(segment_step(glus.segmenter, bank, dict.fromkeys(range(num_rows), q), frame, embeds_EQC[:, q]))
    return torch.stack(masks, dim=1)


# ------------------------------------------------------------------------------------------------- counting


@contextmanager
def counted(glus: Glus) -> Iterator[Counter[str]]:
    """Count what the modules of a model are asked to do while the context lasts."""
    counts: Counter[str] = Counter()
    llava, segmenter = llava_of(glus), glus.segmenter
    assert isinstance(segmenter, Sam2Segmenter)
    llama, sam = llava.llama, segmenter.sam
    first_layer = llama.model.layers[0].mlp.gate_proj

    def calls(tensor: torch.Tensor) -> int:
        return 1

    def tokens(tensor: torch.Tensor) -> int:
        return tensor.shape[:-1].numel()

    watched: list[tuple[str, Any, Callable[[torch.Tensor], int]]] = [
        ("CLIP images", llava.clip, len),
        ("CLIP input bytes", llava.clip, lambda tensor: tensor.nbytes),
        ("SAM2 images", sam.image_encoder, len),
        ("LLM tokens", first_layer, tokens),
        ("LLM calls", first_layer, calls),
        ("LLM head tokens", llama.lm_head, tokens),
        ("memory attention calls", sam.memory_attention.norm, calls),
        ("memory encoder calls", sam.memory_encoder, calls),
    ]
    with ExitStack() as stack:
        for name, module, amount in watched:

            def count(_: nn.Module, arguments: Any, name: str = name, amount: Callable[..., int] = amount) -> None:
                counts[name] += amount(arguments[0])

            stack.callback(module.register_forward_pre_hook(count).remove)
        yield counts


@contextmanager
def timed_verbs(glus: Glus, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds that the model's verbs take in the forward pass while the context lasts."""
    seconds: Counter[str] = Counter()
    verbs: dict[str, list[tuple[Any, str]]] = {
        "vision tower": [(glus.mllm, "see")],
        "LLM": [(glus.mllm, name) for name in ("states", "logits")],
        "SAM2 resize": [(glus.segmenter, "prepare_frames")],
        "SAM2 encoder": [(glus.segmenter, "encode_frames")],
        "memory and masks": [(glus.segmenter, name) for name in ("condition", "decode", "memorize")],
    }

    def timed(label: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            synchronize(device)
            before = time.perf_counter()
            result = verb(*arguments)
            synchronize(device)
            seconds[label] += time.perf_counter() - before  # type: ignore[assignment]
            return result

        return run

    with ExitStack() as stack:
        for label, owner, name in ((label, *verb) for label, found in verbs.items() for verb in found):
            stack.enter_context(mock.patch.object(owner, name, timed(label, getattr(owner, name))))
        yield seconds  # type: ignore[misc]
