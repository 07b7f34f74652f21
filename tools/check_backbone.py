"""Compare an MLLM of any size, weights random, with transformers' own classes on whole, separate conversations.

    python tools/check_backbone.py model=glus_qwen3_vl_tiny
    python tools/check_backbone.py model=glus_internvl3_tiny model.llm.architecture.num_hidden_layers=7 --json out.json
    python tools/check_backbone.py model=glus_tiny --frames 90x160 150x100

Token ids are compared with the family's chat template, visual tokens with its image processor and tower, states with
its forward pass (eager attention, one conversation at a time, nothing shared), gradients with those of that pass. Files
that a model names are not read: the vocabulary is a small one that is made for the check; adapters are left out.
Exits with 1 if anything falls short.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException

if not __package__:  # run by its path: Python looks beside this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus.config import TrainConfig, load_config
from tools.backbones.compare import Deviation, compare_backbone

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"


def frame_size(text: str) -> tuple[int, int]:
    """``90x160`` -> (90, 160): height and width."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="model=..., model.llm.architecture.num_hidden_layers=3, ...")
    parser.add_argument("--frames", nargs="+", type=frame_size, default=[(96, 160), (150, 90)], metavar="HxW",
                        help="sizes of the videos' frames (default: 96x160 150x90)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_intermixed_args(arguments)


def compose_config(overrides: list[str]) -> TrainConfig:
    """The settings of a training run with these overrides.

    Raises:
        ValueError: there are no such settings.
    """
    ConfigStore.instance().store("schema", TrainConfig)
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return load_config(TrainConfig, compose("train", overrides))
    except HydraException as error:
        raise ValueError(str(error)) from error


def print_comparisons(rows: list[Deviation]) -> None:
    """A line for each."""
    for row in rows:
        print(f"{'ok  ' if row.passes else 'FAIL'}  {row.what:<44} {row.value:<10.3g} gate {row.gate:<8.2g} {row.how}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point: 0 if all passes."""
    options = parse_arguments(arguments)
    try:
        config = compose_config(options.overrides)
        torch.manual_seed(options.seed)
        with TemporaryDirectory() as folder:
            rows = compare_backbone(config.model, config.frames, options.frames, Path(folder), options.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_comparisons(rows)
    if options.json:
        options.json.write_text(json.dumps([{**vars(row), "passes": row.passes} for row in rows], indent=1) + "\n")
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
