"""Pictures as videos of one frame: trained on beside videos, and segmented."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from glus.config import DataConfig, FramesConfig, InferenceConfig, LossConfig, MixtureItem
from glus.data.benchmarks.index import read_expressions
from glus.data.chat.llava import LlavaChat
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.loader import build_loader, build_mixture
from glus.inference.predictor import VideoPredictor
from glus.losses.objective import build_objective
from glus.models.pretrained import LoadedModel
from tests.layouts import SIZE
from tests.layouts.pictures import write_reason_seg, write_refcoco
from tests.layouts.youtube_vos import write_ref_youtube_vos

FRAMES = FramesConfig(num_context=2, num_query=3)


def tokenizer_of(model: LoadedModel) -> LlavaChat:
    return LlavaChat(model.vocabulary, model.glus.mllm.tokens_per_frame)


def test_a_batch_of_pictures_and_videos_has_finite_losses(tiny_model: LoadedModel, tmp_path: Path) -> None:
    writers = (write_ref_youtube_vos, write_refcoco, write_reason_seg)
    datasets = [write(tmp_path / write.__name__, "train").dataset for write in writers]
    data = DataConfig({dataset.name: MixtureItem(dataset) for dataset in datasets}, expressions_per_video=2)
    mixture = build_mixture(data, FRAMES, tokenizer_of(tiny_model), tiny_model.glus.mllm.prepare, seed=0)
    first_of = {mixture[number].names[0].split("/")[0]: number for number in range(20)}
    batch = next(build_loader(mixture, [list(first_of.values())], 0, tiny_model.vocabulary.pad_id))
    assert {name.split("/")[0] for name in batch.names} == {dataset.name for dataset in datasets}
    objective = build_objective(LossConfig(), tiny_model.vocabulary.seg_id)
    terms = objective(tiny_model.glus(batch), batch, objective.counts([batch]), np.random.default_rng(0))
    assert all(torch.isfinite(term) for term in terms.values())
    assert terms["bce"] > 0


def test_a_picture_is_segmented(tiny_model: LoadedModel, tmp_path: Path) -> None:
    dataset = write_refcoco(tmp_path / "refcoco", "val").dataset
    expressions = read_expressions(dataset)[:4]
    assert len({expression.video for expression in expressions}) == 1
    video = DatasetVideo(FrameStore(dataset), expressions[0].video, expressions[0].frames)
    predictor = VideoPredictor(tiny_model.glus, tokenizer_of(tiny_model), FRAMES, InferenceConfig(force_seg=True))
    [result] = predictor.segment(video, [expression.text for expression in expressions])
    assert result.masks_RHW.shape == (4, *SIZE)
    assert np.isfinite(result.scores_R).all()
