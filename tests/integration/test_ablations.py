"""Each ablation of configs/README.md trains and predicts: frames, sampling, memory, losses; so do other backbones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from glus.config import QuerySampling, TrainConfig, to_yaml
from glus.data.chat.llava import train_vocabulary
from glus.tokens import Vocabulary

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, sys
sys.path.insert(0, "scripts")
import numpy as np
from omegaconf import OmegaConf
import train
from glus.config import SettingsConfig, TrainConfig, load_config
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.benchmarks.index import read_expressions
from glus.inference.predictor import load_predictor

for file in sys.argv[2:]:
    config = load_config(TrainConfig, OmegaConf.load(file))
    train.train(config)
    predictor, _ = load_predictor(config.output, SettingsConfig(force_seg=True))
    first = read_expressions(config.data.mixture["shapes"].dataset)[0]
    video = DatasetVideo(FrameStore(config.data.mixture["shapes"].dataset), first.video, first.frames)
    masks = np.stack([result.masks_RHW for result in predictor.segment(video, [first.text])])
    with open(sys.argv[1], "a") as out:
        out.write(json.dumps([file, list(masks.shape), len(first.frames)]) + "\\n")
"""


def other_backbones(config: TrainConfig) -> None:
    """A CLIP of four times as many visual tokens; an LLM of another width and vocabulary whose heads share keys."""
    llm, clip = config.model.llm, config.model.clip
    clip.architecture.update(patch_size=4, hidden_size=48, intermediate_size=96, num_attention_heads=3)
    llm.architecture.update(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160)
    llm.tokenizer = str(Path(config.output).with_name("tokenizer"))
    train_vocabulary(llm.tokenizer, ["a green triangle", "what turns"], 480, whole_templates=False)
    before, llm.vocab_size = llm.vocab_size, Vocabulary(llm.tokenizer).size
    assert llm.vocab_size != before


VARIANTS: dict[str, Callable[[TrainConfig], None]] = {
    "no_context": lambda c: setattr(c.frames, "num_context", 0),
    "one_each": lambda c: (setattr(c.frames, "num_context", 1), setattr(c.frames, "num_query", 1)),
    "many_each": lambda c: (setattr(c.frames, "num_context", 8), setattr(c.frames, "num_query", 8)),
    "global_only": lambda c: setattr(c.frames, "query_sampling", QuerySampling.uniform),
    "no_memory": lambda c: setattr(c.model.memory, "enabled", False),
    "end_to_end_memory": lambda c: setattr(c.model.memory, "detach", False),
    "other_backbones": other_backbones,
    "no_contrastive": lambda c: c.loss.weights.update(contrastive=0.0),
    "no_lora": lambda c: (
        setattr(c.model.llm, "lora_rank", 0),
        setattr(c.model, "trainable", ["llm", "seg_head", "projector"]),
    ),
}


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, tiny_train_config: Callable[..., TrainConfig]
) -> dict[str, tuple[list[int], int]]:
    """All variants in one process, since starting one costs more than training."""
    folder = tmp_path_factory.mktemp("ablations")
    files = []
    for name, change in VARIANTS.items():
        config = tiny_train_config(output=str(folder / name))
        config.trainer.steps = 2
        change(config)
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(to_yaml(config))
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(folder / "driver.py"), str(folder / "out.jsonl"), *map(str, files)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return {Path(file).stem: (shape, num_frames) for file, shape, num_frames in lines}


@pytest.mark.parametrize("name", VARIANTS)
def test_trains_and_predicts(results: dict[str, tuple[list[int], int]], name: str) -> None:
    shape, num_frames = results[name]
    assert shape == [num_frames, 1, 64, 64]
