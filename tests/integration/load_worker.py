"""A rank that builds a model from files; tells what it read and what it has (run by test_loading)."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from glus.config import ModelConfig, load_config
from glus.models import pretrained, weights
from glus.train.engine import init_distributed, leave_process_group


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's bits and form."""
    values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values.tobytes()).hexdigest()}"


def main(config_file: str, weights_folder: str, output: str, rank: int) -> None:
    """Write ``<output>.<rank>``: files read, files mapped, an error's text or digests of all tensors."""
    init_distributed(timeout_minutes=5)
    config = load_config(ModelConfig, OmegaConf.load(config_file))  # type: ignore[arg-type]
    files: list[str] = []
    read_tensors = weights.read_tensors

    def counting(path: str | Path) -> dict[str, torch.Tensor]:
        files.append(str(path))
        return read_tensors(path)

    weights.read_tensors = pretrained.read_tensors = counting
    torch.manual_seed(rank)  # what is drawn at random must be equal nevertheless
    content: dict[str, object] = {"error": None}
    try:
        glus = pretrained.build_glus(config)
        tensors = {**dict(glus.named_parameters()), **dict(glus.named_buffers())}
        content["tensors"] = {name: digest(tensor) for name, tensor in tensors.items()}
    except ValueError as error:
        content["error"] = str(error)
    mapped = weights_folder in Path("/proc/self/maps").read_text()
    Path(f"{output}.{rank}").write_text(json.dumps({**content, "files": files, "is_mapped": mapped}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4], rank=int(sys.argv[4]))
    finally:  # torch may abort a process that ends within its group
        leave_process_group()
