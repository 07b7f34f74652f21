"""A merged GLUS-7B of random, sane weights as its authors would publish it, never whole in memory.

python tests/full/random_checkpoint.py FOLDER
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from glus.config import ModelConfig, load_config
from glus.data.chat.llava import train_vocabulary
from glus.models.build import assemble
from glus.models.release_layout import GLUS_KEYS, inv_freq_tensors
from glus.models.weight_files import LazyTensor, write_shards
from glus.tokens import ADDED_TOKENS, Vocabulary
from tests.released_layout import write_clip, write_settings

CONFIGS = Path(__file__).parents[2] / "configs"
SHARD_BYTES = 10**10
LLM_STD = 0.02
"""LLaMA's initial weights: with them, losses start near the logarithm of the number of tokens."""
SENTENCES = ("the red circle", "the square that moves left", "a dog chasing the ball", "all persons, from 0 to 9")


def write_vocabulary(folder: Path) -> Vocabulary:
    """A small vocabulary that cuts templates as LLaMA's does, with the added tokens where LLaMA's have them."""
    train_vocabulary(folder, SENTENCES, 600, whole_templates=False)
    added = {token: 32000 + offset for offset, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return Vocabulary(folder)


def draw(name: str, shape: torch.Size) -> torch.Tensor:
    """A tensor of the LLM, another one for each name: norms are ones, all else is LLaMA's initial distribution."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**60)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, LLM_STD, generator=generator)


def main(folder: Path) -> None:
    """Write ``folder/checkpoint`` and, beside it, its CLIP."""
    torch.manual_seed(0)
    vocabulary = write_vocabulary(folder / "vocabulary")
    entry = OmegaConf.load(CONFIGS / "model" / "glus_7b.yaml")
    entry.clip.weights = entry.llm.weights = entry.segmenter.weights = None
    entry.llm.tokenizer, entry.llm.lora_rank = str(vocabulary.folder), 0
    assert isinstance(entry, DictConfig)
    config = load_config(ModelConfig, entry)
    config.trainable = [part for part in config.trainable if part != "lora"]
    glus = assemble(config, is_llm_empty=True)  # CLIP, SAM2 and the heads are real
    write_settings(folder / "checkpoint", glus, vocabulary)
    write_clip(folder / "clip", glus)
    raw: dict[str, torch.Tensor | LazyTensor] = {}
    for name, value in glus.state_dict().items():
        theirs = GLUS_KEYS.in_file(name)
        if theirs is not None:
            drawn = LazyTensor(value.shape, value.dtype, partial(draw, name, value.shape))
            raw[theirs] = drawn if value.is_meta else value
    raw |= inv_freq_tensors(config.llm.architecture, torch.bfloat16)
    write_shards(folder / "checkpoint", raw, "bin", SHARD_BYTES, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
