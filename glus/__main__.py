"""``glus <command> ...``: all programs under one name, from any folder; in parallel ``torchrun -m glus train ...``."""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from glus.files import PROJECT

COMMANDS = {
    "segment": "scripts/segment_video.py",
    "train": "scripts/train.py",
    "predict": "scripts/predict.py",
    "score": "scripts/score.py",
    "submit": "scripts/submit.py",
    "compare": "scripts/compare.py",
    "report": "scripts/report.py",
    "demo": "scripts/demo.py",
    "show": "scripts/show.py",
    "ablate": "scripts/ablate.py",
    "key-frames": "scripts/score_frames.py",
    "calibrate": "tools/calibrate_existence.py",
    "data shapes": "tools/make_shapes.py",
    "data check": "tools/check_data.py",
    "data davis17": "tools/convert_davis17.py",
    "towers": "tools/pretrain_towers.py",
    "convert": "tools/convert_weights.py",
    "export": "tools/export.py",
    "plan": "tools/plan.py",
    "doctor": "tools/doctor.py",
}
"""Command -> the program behind it, which also runs by itself."""


def help_text() -> str:
    """One line for each command: what its program says of itself."""
    width = max(map(len, COMMANDS))
    rows = [f"  {command:{width}}  {_summary(PROJECT / file)}" for command, file in COMMANDS.items()]
    return "\n".join(["usage: glus <command> ...", "", *rows, "", "glus <command> --help says what each takes."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the program of a command with the words behind it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    command = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if command is None:
        sys.exit(f"error: no command {' '.join(words[:2])!r}{_nearest(words)}; glus --help lists them")
    sys.argv[1:] = words[len(command.split()) :]
    runpy.run_path(str(PROJECT / COMMANDS[command]), run_name="__main__")


def _summary(program: Path) -> str:
    """The first line of its docstring."""
    with program.open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def _nearest(words: Sequence[str]) -> str:
    """Commands that begin with the first word, or are spelled almost as it or as the first two."""
    spelled = {name: command for command in COMMANDS for name in (command, command.split()[-1])}
    near = [*difflib.get_close_matches(" ".join(words[:2]), spelled), *difflib.get_close_matches(words[0], spelled)]
    begun = [command for command in COMMANDS if command.split()[0] == words[0]]
    found = list(dict.fromkeys([*begun, *(spelled[name] for name in near)]))
    return f" (did you mean {', '.join(found)}?)" if found else ""


if __name__ == "__main__":
    main()
