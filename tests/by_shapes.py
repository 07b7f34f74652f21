"""Programs of a GPU run by shapes alone: the meta device in its place, and what would arrive from it made up.

Nothing is computed, so the full size runs on a laptop in seconds, and what runs is the code itself: memory, the sizes
of kernels and what is copied and waited for are those of a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from glus.config import FramesConfig, InferenceConfig
from glus.inference import video_run as clock
from glus.inference.predictor import VideoPredictor
from glus.models.glus import Glus
from glus.models.pretrained import build_glus
from glus.train.plan import CostCounter, LikeOnGpu
from tools.benchmarks.plain import BenchmarkVideo, model_config, stand_in_tokenizer

META = torch.device("meta")
GPU_TOKEN_BUDGET = 16384
"""``inference.token_budget`` of a GPU."""
GRID_LIMIT = 65_535
"""Blocks in y and z of a CUDA grid. Flash attention has one of y per sequence and one of z per head, the
memory-efficient kernel the other way round."""
READS = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)


@dataclass(frozen=True)
class Attention:
    """One call of ``F.scaled_dot_product_attention``."""

    query: tuple[int, ...]
    """(sequences, heads, queries, width)."""
    key: tuple[int, ...]
    is_masked: bool

    @property
    def fits_a_grid(self) -> bool:
        """Whether CUDA can start the kernel."""
        *sequences, heads, _, _ = self.query
        return max(torch.Size(sequences).numel(), heads) <= GRID_LIMIT


@dataclass
class MetaGpu(LikeOnGpu):
    """While it lasts, the meta device behaves like a GPU.

    What is read back from it is full of ones: yes, where it is an answer.
    """

    attention: Counter[Attention] = field(default_factory=Counter)
    """How often attention was called with which shapes."""
    reads: Counter[str] = field(default_factory=Counter)
    """How often numbers were read back, by the name of the verb."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in READS and args[0].device == META:
            self.reads[func.__name__] += 1
            return func(torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu"))
        if func is F.scaled_dot_product_attention:
            names = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            shapes = (tuple(names[name].shape) for name in ("query", "key"))
            self.attention[Attention(*shapes, names.get("attn_mask") is not None)] += 1
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def arrays_go_there() -> Iterator[None]:
    """``torch.from_numpy`` gives tensors of the meta device, as if they had been copied without waiting.

    Prediction copies to a GPU alone, and leaves arrays where they are elsewhere.
    """
    here = torch.from_numpy
    with mock.patch.object(torch, "from_numpy", lambda array: here(array).to(META, non_blocking=True)):
        yield


def full_size_model() -> Glus:
    """``glus_7b`` on the meta device, in evaluation mode."""
    with META:
        return build_glus(model_config("glus_7b"), load_weights=False).eval()


def predictor_of(glus: Glus, **settings: Any) -> VideoPredictor:
    """One whose prompts are about as long as LLaMA's; ``settings`` are of ``InferenceConfig``."""
    inference = replace(InferenceConfig(token_budget=GPU_TOKEN_BUDGET), **settings)
    return VideoPredictor(glus, stand_in_tokenizer(glus.mllm.tokens_per_frame), FramesConfig(), inference)


@dataclass(frozen=True)
class Memory:
    """Bytes of the device beside the weights."""

    peaks: dict[str, int]
    """Stage (``video_run.STAGES``) -> most that was alive at once while it ran."""
    held: int
    """Most that was alive whenever a frame was done: memories, features of the chunk, the shared prefix."""
    gpu: MetaGpu

    @property
    def peak(self) -> int:
        """Most that was alive at once."""
        return max(self.peaks.values())


def predict(
    predictor: VideoPredictor,
    num_expressions: int,
    num_frames: int,
    size: tuple[int, int] = (720, 1280),
    stop_after: int | None = None,
) -> Memory:
    """The memory that a generated video takes.

    Args:
        predictor: on the meta device.
        num_expressions: sentences (E).
        num_frames: of the video.
        size: of its frames, height and width.
        stop_after: frames after which nobody asks for more; None: the whole video.
    """
    video = BenchmarkVideo(num_frames, *size)
    counter = CostCounter(META)
    counter.ignore([*predictor.glus.parameters(), *predictor.glus.buffers()])
    peaks: Counter[str] = Counter()
    held = 0
    with ExitStack() as stack:
        stack.enter_context(arrays_go_there())
        stack.enter_context(_peaks_of_stages(counter, peaks))
        gpu = stack.enter_context(MetaGpu())
        stack.enter_context(counter)
        results = stack.enter_context(closing(predictor.segment(video, video.texts(num_expressions))))
        for _ in islice(results, stop_after):
            held = max(held, counter.bytes.total())
    return Memory(dict(peaks), held, gpu)


@contextmanager
def _peaks_of_stages(counter: CostCounter, peaks: Counter[str]) -> Iterator[None]:
    """Add the peak of each stage that a ``StageClock`` times to ``peaks``."""

    @contextmanager
    def stage(_: clock.StageClock, name: str) -> Iterator[None]:
        counter.peak = counter.bytes.total()
        yield
        peaks[name] = max(peaks[name], counter.peak)

    with mock.patch.object(clock.StageClock, "stage", stage):
        yield


def per_sentence(bytes_by_count: dict[int, int]) -> float:
    """Bytes that each sentence adds, between the fewest and the most."""
    counts: Sequence[int] = sorted(bytes_by_count)
    return (bytes_by_count[counts[-1]] - bytes_by_count[counts[0]]) / (counts[-1] - counts[0])
