"""In training one process reads the weights and the others receive them, as they receive its errors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glus.config import ModelConfig, Precision, to_yaml
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel, build_glus, save_model
from tests.programs import environment
from tests.released_layout import lisa_tensors, rewrite_weights, write_checkpoint

TRAINABLE = ["lora", "embeddings_new_rows", "lm_head_new_rows", "seg_head", "projector", "mask_decoder"]


def build_on_two_ranks(config: ModelConfig, weights: Path, folder: Path) -> list[dict[str, Any]]:
    """What each rank tells of it; they use one port, which is free."""
    (folder / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    worker = f'exec {sys.executable} -m tests.integration.load_worker "$@" $RANK'
    words = [*command, "bash", "-c", worker, "bash", folder / "config.yaml", weights, folder / "told"]
    done = subprocess.run(
        [str(word) for word in words], env=environment(), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"told.{rank}").read_text()) for rank in range(2)]


@pytest.fixture
def parts(tiny_model: LoadedModel, merged_glus: Glus, tmp_path: Path) -> ModelConfig:
    """Training from LISA, SAM2 and CLIP, in bfloat16, with adapters, new rows and a [SEG] head at random."""
    lisa = write_checkpoint(tmp_path / "w" / "LISA", lisa_tensors(merged_glus), merged_glus, tiny_model.vocabulary)
    torch.save({"model": merged_glus.segmenter.sam.state_dict()}, lisa.parent / "sam2.pt")
    config = copy.deepcopy(tiny_model.config.model)
    config.llm.weights, config.clip.weights = str(lisa), str(lisa.parent / "clip")
    config.segmenter.weights = str(lisa.parent / "sam2.pt")
    config.precision, config.trainable, config.iou_head = Precision.bf16, TRAINABLE, True
    return config


@pytest.mark.parametrize("from_start", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_rank_reads_and_all_have_the_same_tensors(
    parts: ModelConfig, tiny_model: LoadedModel, tmp_path: Path, from_start: bool
) -> None:
    if from_start:
        start = copy.deepcopy(tiny_model.config)
        save_model(tmp_path / "w" / "start", tiny_model.glus.state_dict(), start, tiny_model.vocabulary, metadata={})
        parts.weights = str(tmp_path / "w" / "start")
    torch.manual_seed(0)  # rank 0's
    alone = build_glus(parts)
    reader, receiver = build_on_two_ranks(parts, tmp_path / "w", tmp_path)
    assert reader["error"] is receiver["error"] is None
    assert len(set(reader["files"])) == len(reader["files"]) == (2 if from_start else 6)  # folders, and files in them
    assert receiver["files"] == []
    assert receiver["is_mapped"] is False
    names = [name for name, _ in (*alone.named_parameters(), *alone.named_buffers())]
    assert list(reader["tensors"]) == names
    assert receiver["tensors"] == reader["tensors"]


@pytest.mark.slow
def test_an_error_of_the_reader_ends_every_rank(parts: ModelConfig, tmp_path: Path) -> None:
    def spoil(raw: dict[str, torch.Tensor]) -> None:
        if "model.layers.1.mlp.up_proj.weight" in raw:
            raw["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")

    rewrite_weights(Path(str(parts.llm.weights)), spoil)
    reader, receiver = build_on_two_ranks(parts, tmp_path / "w", tmp_path)
    assert "model.layers.1.mlp.up_proj.weight holds 1 values that are NaN or infinite" in reader["error"]
    assert receiver["error"] == reader["error"]
    rewrite_weights(Path(str(parts.llm.weights)), lambda raw: raw.pop("model.norm.weight", None))
    reader, receiver = build_on_two_ranks(parts, tmp_path / "w", tmp_path)
    assert "1 missing, 0 unexpected, 0 wrong shape, 1 bad values" in reader["error"]
    assert receiver["error"] == reader["error"]
