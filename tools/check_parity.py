"""Replay numbers that the authors' implementation recorded, and say how near ours come.

    python tools/check_parity.py tests/parity/recorded --json parity.json

Sizes, counts and cases are read from the folder; what runs is what trains and predicts. Exit status 0: everything the
folder holds was compared and is within its gate (``tools/parity/comparison.py``); what it does not hold is listed as
absent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

if not __package__:  # run as a program: what lies beside it is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus.config.jobs import user_errors
from glus.log import setup_logging
from tools.benchmarks.measuring import command_line
from tools.parity.comparison import Case, Row, is_met, print_table, write_rows
from tools.parity.network import read_fixture
from tools.parity.replay_inference import replay_checkpoint, replay_inference, replay_metrics, replay_preprocess
from tools.parity.replay_training import replay_training

WIDTH = 200
"""Columns of the table where the output is no terminal."""
RECORDED_PARTS = {
    "preprocess": ("all pictures", replay_preprocess),
    "inference": ("all cases", replay_inference),
    "training": ("all steps", replay_training),
    "metrics": ("J, F", replay_metrics),
}
"""Folders of which at least one must be there -> what is absent without it, and what replays it."""


def replay(folder: Path) -> list[Row]:
    """Replay everything that a folder holds.

    Returns:
        One row for each quantity, also for what is missing or cannot be compared.

    Raises:
        FileNotFoundError, ValueError: ``fixture.json`` or SAM2's architecture cannot be read, or there is nothing to
            compare.
    """
    fixture = read_fixture(folder)
    if not any((folder / part).is_dir() for part in RECORDED_PARTS):
        raise FileNotFoundError(f"{folder} holds none of {', '.join(RECORDED_PARTS)}: there is nothing to compare")
    rows: list[Row] = []
    replay_checkpoint(rows, fixture)
    for part, (everything, replay_part) in RECORDED_PARTS.items():
        if (folder / part).is_dir():
            replay_part(rows, fixture)
        else:
            Case(rows, part).absent(everything, f"the folder has no {part}/")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="the recorded numbers, with fixture.json")
    options = parser.parse_args(arguments)
    setup_logging()
    with user_errors():
        rows = replay(options.folder)
        print_table(rows, options.folder.name, Console() if sys.stdout.isatty() else Console(width=WIDTH))
        if options.json:
            write_rows(rows, {"folder": str(options.folder)}, options.json)
    sys.exit(0 if is_met(rows) else 1)


if __name__ == "__main__":
    main()
