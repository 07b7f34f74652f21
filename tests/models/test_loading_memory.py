"""What a process needs while it loads or converts: its weights once, or nothing where they stay in their files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from glus.config import ModelConfig, Precision, to_yaml
from glus.models.build import assemble
from glus.models.pretrained import LoadedModel, build_glus, save_model
from tests.watched import Stage, watch

WIDTHS = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1}
"""LLaMA-7B's; 210 M parameters: 0.42 GB in bfloat16."""
MB = 10**6
ALLOWED = 250 * MB
"""What may be in memory beside the LLM: the [SEG] head, drawn in float32 and cast (100), and tensors on their way."""


@pytest.fixture(scope="module")
def wide(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A config file, a model folder with adapters in bfloat16, and the bytes of its LLM."""
    place = tmp_path_factory.mktemp("wide")
    config = copy.deepcopy(tiny_model.config)
    config.model.llm.architecture |= WIDTHS
    config.model.precision = Precision.bf16
    glus = build_glus(config.model)
    save_model(place / "model", glus.state_dict(), config, tiny_model.vocabulary, metadata={})
    (place / "small.yaml").write_text(to_yaml(tiny_model.config.model))
    (place / "config.yaml").write_text(to_yaml(config.model))
    return place, place / "model", sum(p.nbytes for p in glus.mllm.llama.parameters())


def peak(way: str, config: Path, folder: Path, output: Path) -> int:
    """Bytes of anonymous memory at most."""
    stage: Stage = watch(
        way, float("inf"), "tests/models/memory_worker.py", way, config, folder, output, folder=output.parent
    )
    stage.check()
    return stage.peak_bytes


@pytest.mark.slow
def test_only_what_is_computed_with_takes_memory(wide: tuple[Path, Path, int], tmp_path: Path) -> None:
    place, folder, llm = wide
    base = peak("nothing", place / "small.yaml", folder, tmp_path / "none")
    measured = {
        way: peak(way, place / "config.yaml", folder, tmp_path / way) - base
        for way in ("mapped", "fp32", "start", "export", "to_release")
    }
    assert llm > 400 * MB
    assert 2 * llm < measured["fp32"] < 2 * llm + ALLOWED, measured
    for way in ("mapped", "export", "to_release"):
        assert measured[way] < ALLOWED, measured
    assert measured["start"] < llm + ALLOWED, measured


def test_nothing_large_is_made_before_its_weights_come(wide: tuple[Path, Path, int]) -> None:
    from omegaconf import OmegaConf

    from glus.config import load_config

    config = load_config(ModelConfig, OmegaConf.load(wide[0] / "config.yaml"))  # type: ignore[arg-type]
    glus = assemble(config, is_clip_empty=True, is_llm_empty=True)
    real = sum(p.numel() for p in glus.parameters() if not p.is_meta)
    assert real < 0.2 * sum(p.numel() for p in glus.parameters())
    assert {p.dtype for p in glus.parameters()} == {torch.bfloat16}
