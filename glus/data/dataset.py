"""Training samples: one video, its drawn frames, and some of its sentences with their masks; and batches of them,
in which rows of expressions point at rows of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from glus import distributed
from glus.batch import Batch, Conversation, TrainSample
from glus.config import FramesConfig
from glus.data import sampling
from glus.data.benchmarks.index import by_video
from glus.data.chat import Chat
from glus.data.chat.tree import pack_conversations
from glus.data.frames import FrameStore
from glus.data.masks import MaskStore, by
from glus.types import Expression, ObjectKey, PrepareFrame, Role


@dataclass(frozen=True)
class SampleSettings:
    """How a training sample is made from a video."""

    frames: FramesConfig
    """Numbers of context and query frames, and where query frames come from."""
    expressions_per_video: int
    """Sentences per sample at most."""
    prepare: PrepareFrame
    chat: Chat


class RefVOSDataset:
    """The videos of one split with their sentences.

    Args:
        expressions: those that may be trained on; all of one split.
        frames: the split's frames.
        masks: the split's masks.

    Raises:
        ValueError: no expression, or two expressions of a video list different frames.
    """

    def __init__(self, expressions: Sequence[Expression], frames: FrameStore, masks: MaskStore):
        if not expressions:
            raise ValueError(f"dataset {frames.name!r} has no expression to train on")
        self.name = frames.name
        self._frames, self._masks = frames, masks
        self._videos = by_video(expressions)
        for first, *others in self._videos:
            for other in others:
                if other.frames != first.frames:
                    raise ValueError(f"{other.name} lists other frames than {first.name}; expected those of the video")

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._videos)

    def draw(self, settings: SampleSettings, rng: np.random.Generator) -> TrainSample:
        """A random video of the split with up to ``expressions_per_video`` of its sentences, drawn without replacement.

        Context frames do not depend on query frames; they may coincide.

        Raises:
            FileNotFoundError, ValueError: a frame or mask is missing or unreadable, or sizes differ; nothing is
                drawn in its stead.
        """
        video = self._videos[rng.integers(len(self._videos))]
        count = min(settings.expressions_per_video, len(video))
        chosen = [video[i] for i in rng.choice(len(video), count, replace=False)]
        num_frames, want = len(video[0].frames), settings.frames
        query = sampling.query_indices_train(num_frames, want.num_query, want.query_sampling, rng)
        context = sampling.context_indices_train(num_frames, want.num_context, rng)
        turns = [sampling.draw_turns(e.text, want.num_query, rng) for e in chosen]
        pixels = self._read_frames(video[0], sorted({*context, *query}))
        height, width = pixels[query[0]].shape[:2]
        chat = settings.chat.sized((height, width))
        conversations = [chat.train(drawn, want.num_context, e.name) for drawn, e in zip(turns, chosen, strict=True)]
        masks = [self._masks.read(e, query, (height, width)) for e in chosen]
        before, asked = ([pixels[i] for i in indices] for indices in (context, query))
        sample = make_sample(settings.prepare, before, asked, conversations, masks)
        keys = [
            [ObjectKey(e.dataset, e.video, e.exp_id, e.frames[i], frozenset(e.object_ids)) for i in query]
            for e in chosen
        ]
        return replace(sample, object_keys=keys, names=[e.name for e in chosen])

    def _read_frames(self, expression: Expression, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """Each frame decoded once, (H, W, 3) uint8; all of one size."""
        pixels = {i: self._frames.read(expression.video, expression.frames[i]) for i in indices}
        (first, size), *others = ((i, frame.shape[:2]) for i, frame in pixels.items())
        for i, other in others:
            if other != size:
                raise ValueError(
                    f"{self.name}/{expression.video}: frame {expression.frames[i]} is {by(other)}, but frame "
                    f"{expression.frames[first]} is {by(size)} (height x width); expected one size per video"
                )
        return pixels


class Mixture(Dataset[TrainSample]):
    """An endless stream of training samples from several datasets.

    ``mixture[g]`` is a pure function of the seed and of g = 0, 1, ...: its generator is seeded by (seed, epoch,
    index in the epoch), an epoch being as many samples as there are videos. So a sample does not depend on rank,
    worker or on what was drawn before, and a run that resumes at sample g goes on as if it had never stopped.

    Args:
        datasets: at least one, with different names.
        weights: share of draws of each, positive, relative to each other.
        settings: how a sample is made.
        seed: not negative.

    Raises:
        ValueError: no dataset, a name given twice, or a weight that is not positive.
    """

    def __init__(
        self, datasets: Sequence[RefVOSDataset], weights: Sequence[float], settings: SampleSettings, seed: int
    ):
        names = [dataset.name for dataset in datasets]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a mixture needs at least one dataset, each with a name of its own; found {names}")
        if len(weights) != len(names) or min(weights) <= 0:
            raise ValueError(f"a mixture needs one positive weight per dataset; found {list(weights)} for {names}")
        self.datasets = list(datasets)
        self.shares = np.asarray(weights, np.float64) / np.sum(weights)
        self.settings = settings
        self.seed = seed
        self.epoch_length = sum(len(dataset) for dataset in datasets)

    @property
    def asked_shares(self) -> dict[str, float]:
        """Name of each dataset -> probability that a sample comes from it."""
        return {dataset.name: float(share) for dataset, share in zip(self.datasets, self.shares, strict=True)}

    def __getitem__(self, number: int) -> TrainSample:
        """Sample ``number`` of the stream, counted from 0 over all ranks and steps."""
        assert number >= 0, f"sample numbers count from 0, got {number}"
        epoch, index = divmod(number, self.epoch_length)
        rng = distributed.generator(self.seed, epoch, index)
        dataset = self.datasets[rng.choice(len(self.datasets), p=self.shares)]
        return dataset.draw(self.settings, rng)


def make_sample(
    prepare: PrepareFrame,
    context: Sequence[np.ndarray],
    query: Sequence[np.ndarray],
    conversations: list[Conversation],
    target_masks: list[np.ndarray],
) -> TrainSample:
    """A sample of frames that are in memory, without what contrast and messages need: its objects and its names."""
    context_pixels, query_pixels = (
        # A shape also where there is no frame.
        np.stack([prepare(frame, role) for frame in frames or query[:1]])[: len(frames)]
        for role, frames in ((Role.context, context), (Role.query, query))
    )
    return TrainSample(context_pixels, query_pixels, np.stack(query), conversations, target_masks)


def collate(samples: Sequence[TrainSample], pad_id: int) -> Batch:
    """The samples as one batch; the conversations of each video are packed into one row.

    Args:
        samples: B videos with equal numbers of context and query frames.
        pad_id: token on padding; attention never reaches it.
    """
    rows = [row for row, sample in enumerate(samples) for _ in sample.conversations]
    return Batch(
        context_pixels=_channels_first([sample.context_pixels for sample in samples]),
        query_pixels=_channels_first([sample.query_pixels for sample in samples]),
        query_frames=[torch.from_numpy(sample.query_frames) for sample in samples],
        rows=pack_conversations([sample.conversations for sample in samples], pad_id),
        video_index=torch.tensor(rows, dtype=torch.int64),
        target_masks=[torch.from_numpy(mask) for sample in samples for mask in sample.target_masks],
        object_keys=[keys for sample in samples for keys in sample.object_keys],
        names=[name for sample in samples for name in sample.names],
    )


def _channels_first(frames: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """(F, h, w, 3) -> (F, 3, h, w), of each."""
    return [torch.from_numpy(video).permute(0, 3, 1, 2).contiguous() for video in frames]
