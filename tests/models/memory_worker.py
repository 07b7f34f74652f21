"""Loads a model of some 200 M parameters of the full size's widths in several ways (run by test_loading_memory)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from glus import compat
from glus.config import ModelConfig, Precision, load_config
from glus.models.pretrained import build_glus, load_model
from tools.convert_weights import convert_to_release
from tools.export import export

if __name__ == "__main__":
    way, config_file, folder, output = sys.argv[1:]
    compat.prepare_torchvision()
    config = load_config(ModelConfig, OmegaConf.load(config_file))  # type: ignore[arg-type]
    if way == "fp32":
        model = load_model(folder, Precision.fp32)
    elif way == "mapped":
        model = load_model(folder)
    elif way == "start":
        config.weights = folder
        start = build_glus(config)
    elif way == "export":
        export(Path(folder), Path(output), torch.float32)
    elif way == "to_release":
        convert_to_release(Path(folder), Path(output), torch.float16, file_format="bin", shard_bytes=10**10)
    else:
        assert way == "nothing", way
        build_glus(config, load_weights=False)
