"""One video, all its sentences: windows of query frames slide over it, SAM2 carries the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from glus import distributed
from glus.config import FramesConfig, InferenceConfig, Precision, SettingsConfig
from glus.data.collate import pad_conversations
from glus.data.frames import VideoSource
from glus.data.sampling import context_indices_eval, query_window
from glus.data.tokenization import ConversationTokenizer
from glus.data.transforms import clip_crop
from glus.models.build import LoadedModel, load_model
from glus.models.glus import Glus, segment_step
from glus.models.memory import MemoryBank
from glus.models.sam2 import upsample_masks
from glus.structures import FrameResult


def load_predictor(weights: str | Path, settings: SettingsConfig | None = None) -> tuple[VideoPredictor, LoadedModel]:
    """A trained model, ready to segment: on this process's GPU, or in float32 on the CPU.

    Args:
        weights: model folder or run, see ``models.build.load_model``.
        settings: override the model folder's, which is announced in the log.

    Returns:
        The predictor, and the model with the settings that are in force.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights, config or settings do not fit.
    """
    device = distributed.device()
    model = load_model(weights, Precision.fp32 if device.type == "cpu" else None, settings)
    tokenizer = ConversationTokenizer(model.vocabulary, model.glus.tokens_per_frame)
    return VideoPredictor(model.glus.to(device), tokenizer, model.config.frames, model.config.inference), model


class VideoPredictor:
    """Segments videos with a model, frame by frame, for any number of sentences at once.

    Each frame is decoded, seen by CLIP and encoded by SAM2 once, for all sentences and windows. What the LLM reads
    depends on no answer, so sentences never influence each other: alone or together, they get the same masks.

    Args:
        glus: the model; put into evaluation mode while it predicts.
        tokenizer: expands images to the model's tokens per frame.
        frames: numbers of context and query frames.
        inference: memory stride, what to do without [SEG], the prompt's end.
    """

    def __init__(self, glus: Glus, tokenizer: ConversationTokenizer, frames: FramesConfig, inference: InferenceConfig):
        self.glus = glus
        self.tokenizer = tokenizer
        self.frames = frames
        self.inference = inference

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.glus.parameters()).device

    def segment(
        self, video: VideoSource, texts: Sequence[str], order: Sequence[int] | None = None
    ) -> Iterator[FrameResult]:
        """Masks of every sentence in every frame of ``order``.

        Args:
            video: the frames.
            texts: E sentences.
            order: indices of the frames in processing order; windows and memories count along it. Default: forward.
                The context frames always span the whole video.

        Yields:
            One result per entry of ``order``.

        Raises:
            ValueError: no sentence, no frame, or ``order`` names a frame that the video does not have.
        """
        if not texts or len(video) == 0:
            raise ValueError(f"nothing to segment: {len(texts)} sentences, {len(video)} frames")
        steps = list(order) if order is not None else list(range(len(video)))
        unknown = [frame for frame in steps if not 0 <= frame < len(video)]
        if unknown:
            raise ValueError(f"order names frame {unknown[0]}; the video has frames 0 to {len(video) - 1}")
        windows = [
            query_window(steps, step, self.frames.num_query, self.frames.query_sampling) for step in range(len(steps))
        ]
        context = context_indices_eval(len(video), self.frames.num_context)
        cache = _FrameCache(self.glus, video, context, steps, windows, self.device)
        bank = self.glus.memory_bank(self.inference.memory_stride)
        was_training = self.glus.training
        self.glus.eval()
        try:
            for step, frame in enumerate(steps):
                with torch.inference_mode():
                    result = self._segment_frame(cache, bank, step, frame, texts, [*context, *windows[step]])
                    cache.forget(step)
                yield result
        finally:
            self.glus.train(was_training)

    def _segment_frame(
        self, cache: _FrameCache, bank: MemoryBank, step: int, frame: int, texts: Sequence[str], seen: list[int]
    ) -> FrameResult:
        """Ask for every sentence, then decode those that answered with [SEG]."""
        embeds_EC, logits_EV = self._ask(texts, cache.tokens(seen), num_query=len(seen) - self.frames.num_context)
        seg_id = self.tokenizer.vocabulary.seg_id
        has_seg_E = logits_EV.argmax(-1) == seg_id
        scores_E = logits_EV.float().softmax(-1)[:, seg_id]
        rows = list(range(len(texts)))
        if not self.inference.force_seg:
            rows = [row for row, has in zip(rows, has_seg_E.tolist(), strict=True) if has]
        pixels = cache.pixels(frame)
        masks = np.zeros((len(texts), *pixels.shape[:2]), dtype=bool)
        if rows:
            images = self.glus.segmenter.prepare_frames(torch.as_tensor(pixels, device=self.device)[None])
            features = self.glus.segmenter.encode_frames(images).rows([0] * len(rows))
            decoded = segment_step(self.glus.segmenter, bank, step, features, embeds_EC[rows], rows)
            masks[rows] = (upsample_masks(decoded.logits_Nmm, pixels.shape[:2]) > 0).cpu().numpy()
        return FrameResult(frame, tuple(range(len(texts))), masks, scores_E.cpu().numpy(), has_seg_E.cpu().numpy())

    def _ask(self, texts: Sequence[str], visual_MD: torch.Tensor, num_query: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (E, C) and vocabulary logits (E, V) after one window."""
        windows = [
            self.tokenizer.window(text, self.frames.num_context, num_query, self.inference.trailing_space)
            for text in texts
        ]
        ids, mask, positions = (
            tensor.to(self.device) for tensor in pad_conversations(windows, self.tokenizer.vocabulary.pad_id)
        )
        embeds, logits = self.glus.seg_embeddings(ids, mask, visual_MD.repeat(len(texts), 1), positions)
        return embeds[:, -1], logits[:, -1]


class _FrameCache:
    """Pixels and visual tokens of a video's frames, each computed once and kept while a step still needs it.

    Args:
        glus: makes the tokens.
        video: the frames.
        context: frames that every prompt shows.
        steps: the frame that each step segments.
        windows: the query frames that the prompt of each step shows.
        device: where tokens lie.
    """

    def __init__(
        self,
        glus: Glus,
        video: VideoSource,
        context: Sequence[int],
        steps: Sequence[int],
        windows: Sequence[Sequence[int]],
        device: torch.device,
    ):
        self._glus = glus
        self._video = video
        self._device = device
        self._last_shown = {frame: step for step, window in enumerate(windows) for frame in window}
        self._last_shown |= dict.fromkeys(context, len(windows))
        self._last_segmented = {frame: step for step, frame in enumerate(steps)}
        self._pixels: dict[int, np.ndarray] = {}
        self._tokens: dict[int, torch.Tensor] = {}

    def pixels(self, frame: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        if frame not in self._pixels:
            self._pixels[frame] = self._video.read(frame)
        return self._pixels[frame]

    def tokens(self, frames: Sequence[int]) -> torch.Tensor:
        """Visual tokens of frames, one after another: (len(frames) * P, D)."""
        new = [frame for frame in dict.fromkeys(frames) if frame not in self._tokens]
        if new:
            size = self._glus.clip.image_size
            crops = np.stack([clip_crop(self.pixels(frame), size) for frame in new])
            crops_1FCss = torch.as_tensor(crops, device=self._device).permute(0, 3, 1, 2)[None]
            self._tokens |= zip(new, self._glus.vision_tokens(crops_1FCss)[0], strict=True)
        return torch.cat([self._tokens[frame] for frame in frames])

    def forget(self, step: int) -> None:
        """Drop what no step after ``step`` needs: tokens that no prompt shows, pixels that are not segmented."""
        self._tokens = {frame: value for frame, value in self._tokens.items() if self._last_shown[frame] > step}
        self._pixels = {
            frame: value for frame, value in self._pixels.items() if self._last_segmented.get(frame, -1) > step
        }
