"""The full size by shapes: kernels that CUDA can start, and memory of prediction that a GPU of 24 GiB has."""

from __future__ import annotations

import pytest
import torch

from glus.losses.objective import GlusObjective
from glus.models.glus import Glus, MemoryBank, segment_step, upsample_masks
from glus.train.plan import CostCounter, example_batch, run_backward
from tests.by_shapes import META, Memory, MetaGpu, full_size_model, per_sentence, predict, predictor_of
from tests.train.test_plan import full_size

GIB, MIB = 2**30, 2**20
WEIGHTS_GIB = 13.6
"""Of ``glus_7b`` in bfloat16."""
CONTEXT_GIB = 1.0
"""Of CUDA and cuBLAS in a process that predicts; assumed."""


@pytest.fixture(scope="module")
def glus() -> Glus:
    return full_size_model()


def too_large(gpu: MetaGpu) -> list[object]:
    """Calls of attention that end in "invalid configuration argument"."""
    assert gpu.attention, "attention was not called, or not as a GPU is asked for it"
    return [call for call in gpu.attention if not call.fits_a_grid]


def test_attention_of_prediction_fits_a_grid(glus: Glus) -> None:
    """Also where a chunk has 128 frames: Hiera attends in 1,024 windows of each."""
    predictor = predictor_of(glus, force_seg=True, chunk_frames=128)
    assert too_large(predict(predictor, 2, 128, stop_after=2).gpu) == []


def test_attention_of_training_fits_a_grid(glus: Glus) -> None:
    """Also where a micro-batch has 64 query frames."""
    config = full_size("data.expressions_per_video=1")
    batch = example_batch(config, glus.mllm, num_videos=16).to("meta")
    objective = GlusObjective({"seg": 1, "bce": 2, "dice": 0.5}, seg_id=0)
    glus.train()
    with MetaGpu() as gpu, META:
        run_backward(objective(glus(batch), batch, objective.counts([batch]), rng=None)["total"])  # type: ignore[arg-type]
    glus.eval().zero_grad()
    assert too_large(gpu) == []


@pytest.fixture(scope="module")
def memories(glus: Glus) -> dict[int, Memory]:
    """Number of sentences -> memory of 720p frames that fill all seven memories, on a GPU of 24 GiB."""
    predictor = predictor_of(glus, force_seg=True, memory_stride=1, memory_gb=(24 - WEIGHTS_GIB) / 4)
    return {count: predict(predictor, count, 9) for count in (4, 60)}


def test_a_sentence_holds_its_memories_and_little_else(memories: dict[int, Memory]) -> None:
    """Memories of 64 x 64 cells x 64 channels in bfloat16 are 0.5 MiB each, 3.5 MiB all seven."""
    assert 3.5 * MIB < per_sentence({count: memory.held for count, memory in memories.items()}) < 6 * MIB


@pytest.mark.parametrize("num_memories", [1, 7])
def test_the_estimate_of_a_sentence_in_sam2_holds(glus: Glus, num_memories: int) -> None:
    """``step_bytes``, from which follows how many sentences SAM2 takes together, is no less than they take."""
    rows, segmenter = 8, glus.eval().segmenter
    bank, memory = MemoryBank(7, 1), torch.zeros(rows, 64, 64, 64, dtype=torch.bfloat16, device=META)
    for step in range(num_memories):
        bank.store(dict.fromkeys(range(rows), step), memory)
    with torch.inference_mode(), MetaGpu(), META:
        frame = segmenter.encode_frames(torch.zeros(1, 3, 1024, 1024))
        counter = CostCounter(META)
        counter.ignore([*glus.parameters(), *glus.buffers()])
        with counter:
            prompts = torch.zeros(rows, 256, dtype=torch.bfloat16)
            steps = dict.fromkeys(range(rows), num_memories)
            _, decoded = segment_step(segmenter, bank, steps, frame, prompts)
            upsample_masks(decoded.logits_Nmm, (720, 1280))
    estimate = rows * segmenter.step_bytes(num_memories, (720, 1280))
    assert 0.7 * estimate < counter.peak <= estimate


def test_reading_prompts_does_not_grow_with_their_number(memories: dict[int, Memory]) -> None:
    """The token budget bounds it: keys and values of the shared beginning alone are kept."""
    assert memories[60].peaks["llm"] < 2.5 * GIB


def test_sixty_sentences_fit_a_gpu_of_24_gib(memories: dict[int, Memory]) -> None:
    """With half of what the weights leave to spare."""
    assert memories[60].peak < (0.94 * 24 - WEIGHTS_GIB - CONTEXT_GIB) / 2 * GIB


def test_many_sentences_fit_a_grid_too(memories: dict[int, Memory]) -> None:
    assert too_large(memories[60].gpu) == []


def test_a_chunk_is_read_back_once(memories: dict[int, Memory]) -> None:
    """Whatever the number of sentences; masks travel behind their successors."""
    assert {count: memory.gpu.reads["cpu"] for count, memory in memories.items()} == {4: 1, 60: 1}
