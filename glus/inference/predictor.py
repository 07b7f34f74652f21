"""One video, all its sentences: everything that they share is computed once, and nothing grows with the video."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from glus import distributed
from glus.config import (
    FramesConfig,
    InferenceConfig,
    ModelFolderConfig,
    Precision,
    QuerySampling,
    SettingsConfig,
    Window,
    read_config,
)
from glus.data.chat import Chat, open_chat
from glus.data.frames import FrameStream, VideoSource
from glus.data.sampling import context_indices_eval
from glus.inference.asking import Pass
from glus.inference.video_run import KeepsMask, StageClock, VideoRun, schedule
from glus.models.glus import Glus
from glus.models.hub import find_model
from glus.models.pretrained import CONFIG_FILE, LoadedModel, load_model
from glus.models.weights import Target
from glus.tokens import AnyVocabulary
from glus.types import FrameResult


def check_folder_size(weights: str | Path, allow_cpu: bool) -> None:
    """``distributed.check_size`` of a model folder, before minutes of reading other things.

    Args:
        weights: see ``models.hub.find_model``.
        allow_cpu: a large one may be run on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no GPU is usable, or the folder's config does not fit.
    """
    config = read_config(ModelFolderConfig, find_model(weights) / CONFIG_FILE)
    distributed.check_size(config.model.llm.num_parameters, allow_cpu)


def load_predictor(
    weights: str | Path, settings: SettingsConfig | None = None, allow_cpu: bool = False
) -> tuple[VideoPredictor, LoadedModel]:
    """A trained model, ready to segment: on this process's GPU, or on the CPU, there in float32 if not told otherwise.

    Args:
        weights: see ``models.hub.find_model``.
        settings: override the model folder's, which is announced in the log.
        allow_cpu: see ``check_folder_size``.

    Returns:
        The predictor, and the model with the settings that are in force.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights, config or settings do not fit, or a large model would run on a CPU.
    """
    device, settings = distributed.use_device(), settings or SettingsConfig()
    check_folder_size(weights, allow_cpu)
    is_default = settings.precision is None and device.type == "cpu"
    model = load_model(find_model(weights), Precision.fp32 if is_default else None, settings, target=Target(device))
    chat = chat_of(model.glus, model.vocabulary)
    return VideoPredictor(model.glus, chat, model.config.frames, model.config.inference), model


def chat_of(glus: Glus, vocabulary: AnyVocabulary) -> Chat:
    """The grammar of a model's conversations.

    Raises:
        ValueError: the vocabulary is another family's, or larger than the LLM's tables.
    """
    mllm = glus.mllm
    rows = mllm.decoder.vocab_size
    if vocabulary.size > rows:
        raise ValueError(
            f"model.llm.vocab_size={rows}: the vocabulary in {vocabulary.folder} has ids up to {vocabulary.size - 1}, "
            f"[SEG] being {vocabulary.seg_id}; set model.llm.vocab_size={vocabulary.size}"
        )
    return open_chat(vocabulary, mllm.chat, mllm.grid, glus.reads > 1)


class VideoPredictor:
    """Segments videos with a model, for any number of sentences at once.

    In a pass, each frame is decoded, seen by the MLLM and encoded by the segmenter once, for all sentences and prompts
    (a second pass finds the visual tokens of up to ``video_run.KEPT_FOR_SECOND_PASS`` frames);
    what prompts have in common is read once (``asking.Prompter``). What the LLM reads depends on no answer, so the
    prompts of many frames are read together, and sentences never influence each other: alone or together, they get the
    same masks. Frames are processed ``inference.chunk_frames`` at a time; what no later prompt or memory can reach is
    freed.

    Args:
        glus: the model, in evaluation mode whenever it predicts.
        chat: the grammar of its conversations.
        frames: numbers of context and query frames.
        inference: memory stride, windows, what to do without [SEG], the prompt's end, sizes of chunks and batches.

    Raises:
        ValueError: the settings contradict each other.
    """

    def __init__(self, glus: Glus, chat: Chat, frames: FramesConfig, inference: InferenceConfig):
        if inference.window is Window.clips and frames.query_sampling is not QuerySampling.consecutive:
            raise ValueError("inference.window=clips needs frames.query_sampling=consecutive: a clip is of neighbours")
        self.glus = glus
        self.chat = chat
        self.frames = frames
        self.inference = inference
        self.seconds: dict[str, float] = defaultdict(float)
        """Time spent so far in each of ``video_run.STAGES``, over all videos."""

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.glus.parameters()).device

    def segment(
        self, video: VideoSource, texts: Sequence[str], key_frames: Sequence[int] | None = None
    ) -> Iterator[FrameResult]:
        """Masks of every sentence in every frame.

        Args:
            video: the frames.
            texts: E sentences.
            key_frames: the frame that each sentence starts from, up to the last frame and then, with a fresh memory,
                down to the first; windows and memories count from there. None: from the first frame. The context
                frames always span the whole video.

        Yields:
            Results that together answer each sentence exactly once in each frame; without key frames one per frame,
            in order.

        Raises:
            ValueError: no sentence, no frame, a key frame that the video does not have, or a frame that does not
                decode.
        """
        starts = self._starts(video, texts, key_frames)
        up = Pass(starts, len(video), 1)
        passes: list[tuple[Pass, KeepsMask]] = [(up, lambda row, frame: frame >= starts[row])]
        below = {row: start for row, start in starts.items() if start > 0}
        if below:
            passes.append((Pass(below, len(video), -1), lambda row, frame: frame < starts[row]))
        yield from self._run(video, texts, passes)

    def segment_pass(
        self, video: VideoSource, texts: Sequence[str], key_frames: Sequence[int], direction: int
    ) -> Iterator[FrameResult]:
        """One of the two passes of ``segment`` alone, key frames included: ``direction`` 1 is up, -1 is down."""
        starts = self._starts(video, texts, key_frames)
        yield from self._run(video, texts, [(Pass(starts, len(video), direction), lambda row, frame: True)])

    def score_frames(self, video: VideoSource, texts: Sequence[str]) -> np.ndarray:
        """How well each sentence can be expected to be segmented in each frame, to choose key frames by.

        Where the model has an IoU head, what that says, without the segmenter. Else the probability of [SEG] times the
        stability of the mask that the frame gives without memory. 0 where the mask is empty, for want of [SEG] or
        (without a head) of pixels. The MLLM sees each frame once; nothing but the scores grows with the video.

        Args:
            video: T frames.
            texts: E sentences.

        Returns:
            (E, T) float32 in [0, 1].

        Raises:
            ValueError: no sentence, no frame, or a frame that does not decode.
        """
        up = Pass(self._starts(video, texts, None), len(video), 1)
        with self._opened(video, texts, [up]) as run:
            return run.score(up)

    def _starts(self, video: VideoSource, texts: Sequence[str], key_frames: Sequence[int] | None) -> dict[int, int]:
        if not texts or len(video) == 0:
            raise ValueError(f"nothing to segment: {len(texts)} sentences, {len(video)} frames")
        starts = [0] * len(texts) if key_frames is None else list(key_frames)
        if len(starts) != len(texts):
            raise ValueError(f"{len(starts)} key frames for {len(texts)} sentences; expected one each")
        unknown = [frame for frame in starts if not 0 <= frame < len(video)]
        if unknown:
            raise ValueError(f"key frame {unknown[0]}: the video has frames 0 to {len(video) - 1}")
        return dict(enumerate(starts))

    def _run(
        self, video: VideoSource, texts: Sequence[str], passes: Sequence[tuple[Pass, KeepsMask]]
    ) -> Iterator[FrameResult]:
        with self._opened(video, texts, [one for one, _ in passes]) as run:
            for one, keeps_mask in passes:
                yield from run.follow(one, keeps_mask)

    @contextmanager
    def _opened(self, video: VideoSource, texts: Sequence[str], passes: Sequence[Pass]) -> Iterator[VideoRun]:
        """A video to be run over; the time it takes is counted in the end."""
        assert not self.glus.training, "adapters would drop activations at random: glus.eval()"
        context = context_indices_eval(len(video), self.frames.num_context)
        mllm = self.glus.mllm
        ahead, clock = 2 * self.inference.chunk_frames, StageClock(self.device)
        stream = FrameStream(video, schedule(context, passes, mllm.roles), mllm.prepare, ahead)
        with closing(stream):
            try:
                yield VideoRun(self.glus, self.chat, self.frames, self.inference, stream, context, texts, passes, clock)
            finally:
                clock.add_to(self.seconds)
