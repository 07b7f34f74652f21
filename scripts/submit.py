"""Make the zip that the server of a benchmark takes, or say what is wrong with the predictions.

    python scripts/submit.py dataset=mevis_valid predictions=outputs/glus_s/mevis_valid output=outputs/mevis.zip

Predictions are PNGs or run-length codes. The zip appears only if every video, expression, frame and size is right.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from glus.config import SubmitConfig, load_config
from glus.evaluation.submission import build_submission


@hydra.main(version_base="1.3", config_path="../configs", config_name="submit")
def main(cfg: DictConfig) -> None:
    """Entry point; takes Hydra overrides, see ``SubmitConfig``."""
    try:
        config = load_config(SubmitConfig, cfg)
        made = build_submission(config.dataset, config.predictions, config.output, config.num_workers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{made.path}: {made.num_masks} masks of {made.num_expressions} expressions in {made.num_videos} videos")


if __name__ == "__main__":
    main()
