"""Whether a model folder's model may be run on the device at hand."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from glus import distributed
from glus.config import ModelFolderConfig, load_config
from glus.models.build import CONFIG_FILE, find_model_folder


def check_folder_size(weights: str | Path, allow_cpu: bool) -> None:
    """``distributed.check_size`` of a model folder, before minutes of reading other things.

    Args:
        weights: see ``models.build.find_model_folder``.
        allow_cpu: a large one may be run on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no GPU is usable, or the folder's config does not fit.
    """
    folder = find_model_folder(weights)
    config = load_config(ModelFolderConfig, OmegaConf.load(folder / CONFIG_FILE))  # type: ignore[arg-type]
    distributed.check_size(config.model.llm.num_parameters, allow_cpu)
