"""Replay numbers that the authors' implementation recorded, and say how near ours come.

    python tools/check_parity.py tests/parity/recorded --json parity.json

Sizes, counts and cases are read from the folder; what runs is what trains and predicts. Exit status 0: everything the
folder holds was compared and is within its gate (``tools/parity/gates.py``); what it does not hold is listed as absent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from glus.log import setup_logging
from tools.parity.replay import replay
from tools.parity.report import print_table, write_json

WIDTH = 200
"""Columns of the table where the output is no terminal."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the recorded numbers, with fixture.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        report = replay(options.folder)
        print_table(report, Console() if sys.stdout.isatty() else Console(width=WIDTH))
        if options.json:
            write_json(report, options.json)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if report.is_met else 1)


if __name__ == "__main__":
    main()
