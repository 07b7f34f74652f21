"""Pre-training of the small towers (vision, LLM and SAM2) on generated scenes: one loop, and what each tower learns.

All of them learn on single frames first. Real CLIP learns from captions; labels of patches reach the same kind of
features in minutes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from glus.batch import Conversation
from glus.config import FramesConfig
from glus.data import sampling
from glus.data.chat import Chat
from glus.data.chat.tree import separate_rows
from glus.data.sampling import draw_turns
from glus.distributed import generator
from glus.losses.objective import binary_cross_entropy, dice_loss, mask_iou, seg_cross_entropy
from glus.models.glus import MemoryBank, segment_step, upsample_masks
from glus.models.mllm.llava import ClipEncoder, Llava, clip_crop
from glus.models.segmenter.sam2 import Sam2Segmenter
from glus.shapes.labels import (
    COLOUR_LABELS,
    SHAPE_LABELS,
    PatchHead,
    PatchLabels,
    SentenceHead,
    WordPrompts,
    patch_labels,
    sentence_labels,
    stack,
)
from glus.shapes.scene import TOWER_SPLIT, Scene

TOKEN_SIDE = 2
"""Patches along a visual token that labels are read for, of the families that merge squares of them."""
WARMUP_STEPS, DECAY_SHARE = 60, 0.3
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.98), 0.01, 1.0
SENTENCES_PER_SCENE = 3
ANSWER_WEIGHT = 0.1
"""Of the [SEG] cross-entropy. Learned only in GLUS's training, at weight 1, it shrinks every state onto the one
direction that predicts [SEG] before masks have taught anything (embeddings' spread halved in 60 steps, measured)."""
TARGETS_PER_CLIP = 4
"""Half by place and half by words; the image encoder runs once for all of them."""
PROMPT_NOISE = 0.05
"""Standard deviation of the noise on prompts, whose own entries are about 0.7: the LLM's will not be perfect."""
LABEL_WEIGHT = 0.3
"""Of the patch labels, read off SAM2's features. With them words reach IoU 0.75 by step 1000 instead of 0.60, and
prompts by place are followed by step 1100 instead of not at all (measured; 64 and 128 pixels)."""

MOST_MEMORIES, LONGEST_STRIDE = 7, 3
"""Memories of a frame and their distance, drawn for each batch. With few, an object has to be held by what was itself
remembered, as in a video longer than any clip (always with all 7, clips of 3 frames: after seven frames one of four
pairs was lost, measured). With distant ones, as at inference, those of long ago must not speak for a place."""

PASSING_SHARE = 0.6
"""Of the clips, around the moment where look-alikes pass each other, which is a matter of a few frames. Without such
clips memory keeps to the place, where the other one is then: right in 5 % of the frames afterwards (measured)."""

HELD_WEIGHT = 1.0
"""Of the share of a cell that the remembered object covers, read off conditioned features: memory is found earlier."""


class Tower(ABC):
    """A part of a small GLUS that is pre-trained, and what it learns."""

    stream: int
    """Part of the key of its random numbers."""
    single_frame_share = 1.0
    """Of the steps, on single frames."""
    modules: Sequence[nn.Module]
    """What is trained: the part itself, and heads that are thrown away."""

    def set_trained(self, is_trained: bool) -> None:
        """Called with True before the first step and with False after the last one."""
        for module in self.modules:
            module.train(is_trained).requires_grad_(is_trained)

    @abstractmethod
    def loss(self, rng: np.random.Generator, is_single: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """Draw a batch; returns its loss, and what is to be reported of the step.

        Args:
            rng: decides the batch.
            is_single: whether to draw single frames.
        """


def pretrain(tower: Tower, steps: int, learning_rate: float, seed: int) -> Iterator[dict[str, float]]:
    """Train a tower, which is frozen in the end: AdamW with warm-up, plateau and decay, and clipped gradients.

    Args:
        tower: trained in place.
        steps: optimizer steps.
        learning_rate: of the plateau.
        seed: decides the batches.

    Yields:
        After each step, what the tower reports of it.
    """
    tower.set_trained(True)
    parameters = [*dict.fromkeys(parameter for module in tower.modules for parameter in module.parameters())]  # tied
    optimizer = torch.optim.AdamW(parameters, learning_rate, BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_hold_decay(steps))
    for step in range(steps):
        is_single = step < tower.single_frame_share * steps
        loss, values = tower.loss(generator(seed, TOWER_SPLIT, tower.stream, step), is_single)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        yield values
    tower.set_trained(False)


def warmup_hold_decay(total_steps: int) -> Callable[[int], float]:
    """Factor of the peak: linear from 0, then 1, then linear to 0 over the last ``DECAY_SHARE`` of the steps.

    What happens before the decay does not depend on how long the run will be.
    """
    decay_steps = max(1, round(DECAY_SHARE * total_steps))
    return lambda step: min(1.0, (step + 1) / WARMUP_STEPS, (total_steps - step) / decay_steps)


def see(tower: Any, frames: Sequence[np.ndarray]) -> torch.Tensor:
    """What CLIP, or the vision tower of an MLLM, makes of frames of one size: (F, P, *visual_shape)."""
    is_clip = isinstance(tower, ClipEncoder)
    shown = np.stack([clip_crop(frame, tower.image_size) if is_clip else tower.prepare(frame) for frame in frames])
    return (tower if is_clip else tower.see)(torch.as_tensor(shown).permute(0, 3, 1, 2))


def part_modules(mllm: Any, *parts: str) -> list[nn.Module]:
    """The modules of some of ``Mllm.PARTS`` that are modules."""
    return [mllm.get_submodule(name.strip(".").removeprefix("mllm.")) for part in parts for name in mllm.PARTS[part]]


@dataclass(eq=False)
class VisionTower(Tower):
    """CLIP, or the tower of an MLLM that comes in one piece, projector included, says from each visual token what lies
    in every patch of it."""

    tower: Any
    """``ClipEncoder`` or the MLLM."""
    scenes: Sequence[Scene]
    batch_size: int
    """Frames per step."""
    stream = 1

    def __post_init__(self) -> None:
        self.is_clip = isinstance(self.tower, ClipEncoder)
        if self.is_clip:
            width, pool, trained = self.tower.width, self.tower.pool, [self.tower]
        else:
            width, pool = math.prod(self.tower.visual_shape), TOKEN_SIDE**2
            trained = part_modules(self.tower, "vision", "projector")
        self.head = PatchHead(width, pool)
        self.modules = [*trained, self.head]

    def loss(self, rng: np.random.Generator, is_single: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """Reports the loss, the error of places and the accuracies of shape and colour."""
        frames = draw_frames(rng, self.scenes, self.batch_size)
        features_FPC = see(self.tower, [scene.frames_THW3[t] for scene, t in frames]).flatten(2)
        grid = round((features_FPC.shape[1] * self.head.pool) ** 0.5)
        labels = patch_labels(frames, grid)
        if not self.is_clip:  # which pools patches in raster order
            labels = PatchLabels(*(_by_token(each, grid // TOKEN_SIDE) for each in labels))
        loss, values = self.head(features_FPC, labels)
        return loss, {"loss": float(loss.detach()), **values}


def _by_token(labels: torch.Tensor, rows: int) -> torch.Tensor:
    """(F, G * G, ...) of patches in raster order -> the same with the patches of a visual token side by side."""
    squares = labels.unflatten(1, (rows, TOKEN_SIDE, rows, TOKEN_SIDE)).transpose(2, 3)
    return squares.flatten(1, 4)


def draw_frames(rng: np.random.Generator, scenes: Sequence[Scene], count: int) -> list[tuple[Scene, int]]:
    """Frames of scenes."""
    drawn = [scenes[i] for i in rng.integers(len(scenes), size=count)]
    return [(scene, int(rng.integers(len(scene.frames_THW3)))) for scene in drawn]


@dataclass(eq=False)
class LlmTower(Tower):
    """The LLM (with LLaVA's projector) answers with [SEG], and says, from the state before it, what a sentence names
    and where that is.

    A single frame without context is a fifth as long as a conversation: words and places are learned there.
    """

    mllm: Any
    """Its vision tower is pre-trained and stays frozen."""
    tokenizer: Chat
    layouts: Sequence[FramesConfig]
    """K, Q and sampling of whole conversations; each step draws one, so that no variant of the method starts behind."""
    scenes: Sequence[Scene]
    batch_size: int
    """Videos per step on single frames, each with ``SENTENCES_PER_SCENE`` rows; whole conversations are drawn in half
    that number."""
    stream, single_frame_share = 3, 0.5

    def __post_init__(self) -> None:
        is_llava = isinstance(self.mllm, Llava)
        tower = self.mllm.clip if is_llava else self.mllm
        with torch.no_grad():
            self.features = [see(tower, list(scene.frames_THW3)) for scene in self.scenes]
        self.head = SentenceHead(self.mllm.width)
        parts = ("projector", "llm") if is_llava else ("llm",)
        self.modules = [*part_modules(self.mllm, *parts), self.head]
        self.connect: nn.Module = self.mllm.projector if is_llava else nn.Identity()

    def loss(self, rng: np.random.Generator, is_single: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """Reports the loss and the accuracies of words, count and place."""
        layout = self.layouts[int(rng.integers(len(self.layouts)))]
        want = FramesConfig(num_context=0, num_query=1) if is_single else layout
        videos = self.batch_size if is_single else max(1, self.batch_size // 2)
        conversations, visual, labels = [], [], []
        for number in rng.integers(len(self.scenes), size=videos):
            scene, length = self.scenes[number], len(self.scenes[number].frames_THW3)
            query = sampling.query_indices_train(length, want.num_query, want.query_sampling, rng)
            context = sampling.context_indices_train(length, want.num_context, rng)
            for chosen in rng.choice(len(scene.sentences), SENTENCES_PER_SCENE, replace=False):
                sentence = scene.sentences[chosen]
                turns = draw_turns(sentence.text, want.num_query, rng)
                conversations.append(self.tokenizer.train(turns, want.num_context, sentence.text))
                visual.append(self.features[number][[*context, *query]])
                labels += [(sentence, scene, t) for t in query]
        states_RD = self._states(conversations, torch.stack(visual))
        loss, values = self.head(states_RD, sentence_labels(labels))
        vocabulary = self.tokenizer.vocabulary
        answer = seg_cross_entropy(self.mllm.decoder.logits(states_RD), vocabulary.seg_id).mean()
        return loss + ANSWER_WEIGHT * answer, {"loss": float(loss.detach()), **values}

    def _states(self, conversations: Sequence[Conversation], features_NFP: torch.Tensor) -> torch.Tensor:
        """(N * Q, D): states that are to predict [SEG]."""
        rows = separate_rows(conversations, self.tokenizer.vocabulary.pad_id)
        states_RD, _ = self.mllm.states(rows, self.connect(features_NFP).flatten(0, 2))
        return states_RD


class Clips(NamedTuple):
    """R targets to segment in frames of V videos."""

    video_R: torch.Tensor
    targets_RTHW: torch.Tensor
    words_RT2: torch.Tensor
    """Labels of the shape and colour that a frame's prompt names, 0: not named."""
    places_RTHW: torch.Tensor
    """What a prompt without words shows; where that is nothing, the mask is left to the memory."""
    is_vague_R: torch.Tensor
    """Prompts before ``corrected_R``, or all but the first, fit two look-alikes, of which the target is one."""
    corrected_R: torch.Tensor
    """The frame whose prompt is the first clear one, or names another object; the number of frames if none does."""

    def are_held(self, t: int) -> torch.Tensor:
        """(R,) bool: earlier frames tell which object the target is."""
        return (t < self.corrected_R) & (~self.is_vague_R | (self.corrected_R == self.targets_RTHW.shape[1]))


@dataclass(eq=False)
class Sam2Tower(Tower):
    """SAM2 learns prompt -> mask in the first frame, memory -> mask in later ones, with gradients through the memory.

    Prompts are places (the mean click of a target) or words ("red", "circle"): an LLM that starts from little can then
    tell the decoder what to look for long before it can tell where. Words need no click, which makes the features tell
    colours and shapes apart, as real features do. Prompts are for one object, several, or none; in later frames half of
    them are left out. A quarter of the rows have prompts that fit two look-alikes: after a clear one, so that memory
    has to hold what it named, or before it, so that memory has to give way, as where the LLM is undecided at first.
    Other clear prompts come later for another object than the first. Where look-alikes pass each other, all rows are of
    them, most named in the first frame and both afterwards. Prompts are learned before memory.
    """

    segmenter: Sam2Segmenter
    scenes: Sequence[Scene]
    batch_size: int
    """Clips per step, each with ``TARGETS_PER_CLIP`` targets."""
    num_frames: int
    """Consecutive frames of a clip, at most; at least half as many. The first clips have one."""
    stream, single_frame_share = 2, 0.55

    def __post_init__(self) -> None:
        self.words = WordPrompts(self.segmenter.width)
        self.head = PatchHead(self.segmenter.width, pool=1)
        self.held = nn.Linear(self.segmenter.width, 1)
        self.modules = [self.segmenter, self.words, self.head, self.held]

    def set_trained(self, is_trained: bool) -> None:
        """With gradients through the memory."""
        super().set_trained(is_trained)
        self.segmenter.note_trained()
        self.segmenter.memory_gradient = is_trained

    def loss(self, rng: np.random.Generator, is_single: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """Reports the loss and the IoU by place, by words, in later frames, where the prompt is vague after a clear
        one, and where it is clear after a vague or another one (NaN where a batch has none)."""
        length = 1 if is_single else int(rng.integers(max(2, self.num_frames // 2), self.num_frames + 1))
        frames, clips = draw_clips(rng, self.scenes, self.batch_size, length)
        pixels = torch.as_tensor(np.stack([scene.frames_THW3[t] for scene, t in frames]))
        features = self.segmenter.encode_frames(self.segmenter.prepare_frames(pixels))
        image_FPC = features.image_NChw.flatten(2).transpose(1, 2)
        label_loss, _ = self.head(image_FPC, patch_labels(frames, features.image_NChw.shape[-1]))
        num_memories, stride = (int(rng.integers(1, most + 1)) for most in (MOST_MEMORIES, LONGEST_STRIDE))
        bank = MemoryBank(num_memories, stride)
        losses, ious, held = [], [], []
        for t in range(length):
            frame = features.rows(clips.video_R * length + t)
            prompts, target = self._prompts(clips, t), clips.targets_RTHW[:, t]
            steps = dict.fromkeys(range(len(prompts)), t)
            conditioned, decoded = segment_step(self.segmenter, bank, steps, frame, prompts)
            logits = upsample_masks(decoded.logits_Nmm, (target.shape[-2], target.shape[-1]))
            if t:
                held.append(self._held_loss(conditioned.image_NChw, clips, t))
            losses.append(2 * binary_cross_entropy(logits, target).mean() + 0.5 * dice_loss(logits, target).mean())
            ious.append(mask_iou(logits, target))
        loss, is_vague_first = torch.stack(losses).mean(), clips.is_vague_R & (clips.corrected_R < length)
        by_words = clips.words_RT2[:, 0].any(1)
        by_place = ~by_words & ~is_vague_first
        values = {"loss": loss.detach(), "iou_place": ious[0][by_place].mean()}
        values["iou_words"] = ious[0][by_words & ~is_vague_first].mean()
        if not is_single:
            values["iou_later"] = torch.cat(ious[1:]).mean()
            later_RT = torch.stack(ious[1:], 1)
            is_corrected_RT = torch.arange(1, length) >= clips.corrected_R[:, None]
            values["iou_vague"] = later_RT[clips.is_vague_R & ~is_vague_first].mean()
            values["iou_corrected"] = later_RT[is_corrected_RT].mean()
            loss = loss + HELD_WEIGHT * torch.stack(held).mean()
        return loss + LABEL_WEIGHT * label_loss, {name: float(value) for name, value in values.items()}

    def _held_loss(self, image_NChw: torch.Tensor, clips: Clips, t: int) -> torch.Tensor:
        """Of the target's share of each cell, read off features that were conditioned on memory."""
        share_Rhw = F.adaptive_avg_pool2d(clips.targets_RTHW[:, t].float(), image_NChw.shape[-1])
        read_Rhw = self.held(image_NChw.permute(0, 2, 3, 1))[..., 0]
        is_held_R = clips.are_held(t)
        return F.binary_cross_entropy_with_logits(read_Rhw[is_held_R], share_Rhw[is_held_R])

    def _prompts(self, clips: Clips, t: int) -> torch.Tensor:
        """Noisy prompts of each row, by words or by place, or "no point" where it is left to the memory: (R, C)."""
        words_R2 = clips.words_RT2[:, t]
        places = self.segmenter.mask_prompt(clips.places_RTHW[:, t])
        prompts = torch.where(words_R2.any(1)[:, None], self.words(words_R2), places)
        return prompts + PROMPT_NOISE * torch.randn_like(prompts)


def draw_clips(
    rng: np.random.Generator, scenes: Sequence[Scene], count: int, num_frames: int
) -> tuple[list[tuple[Scene, int]], Clips]:
    """The frames of ``count`` clips, one clip after the other, and what to segment in them."""
    frames, rows = [], []
    passing = [scene for scene in scenes if scene.structure == "crossing"]
    for video in range(count):
        is_passing = num_frames > 1 and rng.random() < PASSING_SHARE
        drawn = passing if passing and is_passing else scenes
        scene = drawn[int(rng.integers(len(drawn)))]
        first, last = 0, len(scene.frames_THW3) - num_frames
        if _is_passing(scene, num_frames):  # half-way, before which it has to begin
            middle = len(scene.frames_THW3) // 2
            last = min(last, middle - 2)
            first = max(0, min(last, middle + 1 - num_frames))
        start = int(rng.integers(first, last + 1))
        clip = range(start, start + num_frames)
        frames += [(scene, t) for t in clip]
        for row in range(TARGETS_PER_CLIP):
            rows.append((video, *_draw_row(rng, scene, clip, row)))
    return frames, Clips(*stack(rows))


def _is_passing(scene: Scene, num_frames: int) -> bool:
    """Whether a clip of a scene is to show how look-alikes pass each other."""
    return num_frames > 1 and scene.structure == "crossing"


def _draw_row(
    rng: np.random.Generator, scene: Scene, clip: range, row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool, int]:
    """The fields of ``Clips`` behind the first: by words in odd rows, vague in row 2, for another object in row 0; all
    vague where look-alikes pass each other."""
    is_passing = _is_passing(scene, len(clip))
    by_words, is_vague = row % 2 == 1 and not is_passing, row == 2 or is_passing
    words, chosen = _draw_words(rng, scene, clip[0]) if by_words else ((0, 0), _draw_objects(rng, scene))
    pair = [item.object_id for item in scene.look_alikes]
    if is_vague:
        chosen = [int(rng.choice(pair))]
    masks_OTHW = scene.masks_OTHW[:, clip.start : clip.stop]
    targets_THW: np.ndarray = np.any(masks_OTHW[chosen], axis=0)
    is_corrected = len(clip) > 1 and not by_words and rng.random() < (0.1 if is_passing else 0.5)
    corrected = int(rng.integers(1, len(clip))) if is_corrected else len(clip)
    if is_corrected and not is_vague:
        targets_THW[corrected:] = masks_OTHW[rng.integers(len(masks_OTHW)), corrected:]
    vague_frames = range(0 if is_corrected else 1, corrected) if is_vague else range(0)
    places_THW, words_T2 = np.zeros_like(targets_THW), np.zeros((len(clip), 2), np.int64)
    for number, frame in enumerate(clip):
        if number in vague_frames:
            if rng.random() < 0.5:
                words_T2[number, 0] = SHAPE_LABELS.index(scene.objects[pair[0]].shape)
            else:
                places_THW[number] = masks_OTHW[pair, number].any(0)
        elif number not in (0, corrected) and rng.random() < 0.5:
            continue
        elif not by_words:
            places_THW[number] = targets_THW[number]
        elif _fitting(scene, words, frame) == chosen:
            words_T2[number] = words
    return targets_THW, words_T2, places_THW, is_vague, corrected


def _draw_objects(rng: np.random.Generator, scene: Scene) -> list[int]:
    """Up to two."""
    count = int(rng.choice([0, 1, 2], p=[0.1, 0.65, 0.25]))
    return rng.choice(len(scene.objects), count, replace=False).tolist()


def _draw_words(rng: np.random.Generator, scene: Scene, frame: int) -> tuple[tuple[int, int], list[int]]:
    """Labels of shape and colour (one of them may be left out), and what they fit in a frame, now and then nothing."""
    one, other = (scene.objects[int(i)] for i in rng.integers(len(scene.objects), size=2))
    # Words of one object, or, in one case of five, the shape of one and the colour of another: often none fits.
    colour = (other if rng.random() < 0.2 else one).colour_T[frame]
    named = rng.choice(["shape", "colour", "both"], p=[0.25, 0.25, 0.5])
    words = (0 if named == "colour" else SHAPE_LABELS.index(one.shape), COLOUR_LABELS.index(colour))
    words = (words[0], 0) if named == "shape" else words
    return words, _fitting(scene, words, frame)


def _fitting(scene: Scene, words: tuple[int, int], frame: int) -> list[int]:
    """Objects that have the named shape and colour in a frame."""
    shape, colour = SHAPE_LABELS[words[0]], COLOUR_LABELS[words[1]]
    return [
        item.object_id
        for item in scene.objects
        if shape in (None, item.shape) and colour in (None, item.colour_T[frame])
    ]
