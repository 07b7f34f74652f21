"""Run one stage: ``python -m tools.qualification training outputs/qualify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from glus import distributed
from tools.qualification.outcome import choose_sizes
from tools.qualification.stages import STAGES, run_stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run one stage of tools/qualify.py.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    run_stage(options.stage, options.folder, choose_sizes(distributed.device()))
