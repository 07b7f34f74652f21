"""Small batches for the objective, without a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glus.batch import Batch, GlusOutput, TokenRows
from glus.types import ObjectKey

CaseMaker = Callable[..., tuple[Batch, GlusOutput]]


@pytest.fixture
def make_case() -> CaseMaker:
    """``make_case(sizes=((9, 7), (12, 5)))``: one expression per size, Q = 2, with what a model might answer."""

    def make(
        sizes: tuple[tuple[int, int], ...] = ((9, 7), (12, 5)), seed: int = 0, video: str = "v"
    ) -> tuple[Batch, GlusOutput]:
        generator = torch.Generator().manual_seed(seed)
        n, q = len(sizes), 2
        empty = torch.zeros(0)
        batch = Batch(
            context_pixels=[empty],
            query_pixels=[empty],
            query_frames=[],
            rows=TokenRows(*[torch.zeros(1, 8, dtype=torch.int64)] * 4, reads_R=torch.zeros(n * q, dtype=torch.int64)),
            video_index=torch.zeros(n, dtype=torch.int64),
            target_masks=[torch.randint(0, 2, (q, *size), dtype=torch.uint8, generator=generator) for size in sizes],
            object_keys=[
                [ObjectKey("mevis", video, str(row), str(frame), frozenset({1})) for frame in range(q)]
                for row in range(n)
            ],
            names=[str(row) for row in range(n)],
        )
        output = GlusOutput(
            seg_logits_NQV=torch.randn(n, q, 11, generator=generator).requires_grad_(),
            seg_embeds_NQC=torch.randn(n, q, 6, generator=generator).requires_grad_(),
            mask_logits_NQmm=torch.randn(n, q, 4, 4, generator=generator).requires_grad_(),
        )
        return batch, output

    return make
