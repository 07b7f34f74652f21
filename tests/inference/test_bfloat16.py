"""In bfloat16, the predictor that shares and the plain procedure give nearly the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glus import distributed
from glus.config import Precision, SettingsConfig
from glus.inference.predictor import load_predictor
from tools.benchmarks.plain import SHIPPED_MODEL, BenchmarkVideo, segment_plainly


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_mean_iou_of_shared_and_plain_masks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    predictor, _ = load_predictor(SHIPPED_MODEL, SettingsConfig(precision=Precision.bf16))
    ious = []
    for seed in range(2):
        video = BenchmarkVideo(12, 128, 128, seed=seed)
        texts = [sentence.text for sentence in video.scene.sentences][:3]
        ours_ETHW = np.stack([result.masks_RHW for result in predictor.segment(video, texts)], axis=1)
        for text, ours_THW in zip(texts, ours_ETHW, strict=True):
            logits_THW = torch.stack([logits for logits, _ in segment_plainly(predictor, video, text)])
            plain_THW = (logits_THW > 0).cpu().numpy()
            union = (ours_THW | plain_THW).sum((1, 2))
            ious += np.where(union > 0, (ours_THW & plain_THW).sum((1, 2)) / np.maximum(union, 1), 1.0).tolist()
    assert np.mean(ious) >= 0.99
