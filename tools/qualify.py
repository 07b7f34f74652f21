"""Qualify a machine: everything that GLUS needs of it, checked and measured by one command, on one page.

    python tools/qualify.py                                   # into outputs/qualify; 10 minutes on a GPU, 2 on a CPU
    python tools/qualify.py --only training prediction

Writes ``qualify.md`` (for people) and ``qualify.json`` (the same and more, as data). Each stage runs in a process of
its own and leaves ``<stage>.json`` and ``<stage>.log``; what is done is not done again by the same command, so that it
can be interrupted. Nothing is downloaded: the full size has random weights. Exit status 1 unless every stage passes or
is absent, for want of a GPU, a library or room on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: what lies beside it is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus.files import PROJECT, write_text
from glus.log import run_info
from tools.benchmarks.measuring import Table
from tools.benchmarks.stages import MACHINE_TESTS, WEIGHTS_FOLDER

TIME_LIMIT = 600.0
"""Seconds that a stage may take."""
TIMED_OUT = 124
"""Exit status of one that takes longer, as of the program ``timeout``."""
SIGNAL_HINTS = {"SIGILL": "; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 may help", "SIGKILL": "; memory may have run out"}
StageRecord = dict[str, Any]
Start = Callable[[str, Path], int]
"""Runs a stage, which is to write its JSON file below the folder; gives the exit status of its process."""


def start_stage(name: str, folder: Path) -> int:
    """Run a stage in a process of its own, its output in ``<folder>/<name>.log``."""
    command = [sys.executable, "-m", "tools.benchmarks.stages", name, str(folder.absolute())]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            log.write(f"\nstopped after {TIME_LIMIT:.0f} s\n")
            return TIMED_OUT
        finally:
            with suppress(ProcessLookupError):  # what it started must not hold the GPU either
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_stages(names: Sequence[str], folder: Path, start: Start) -> Iterator[StageRecord]:
    """The record of each stage, from an earlier run of the command on this machine if that finished it.

    The environment is always looked at again: it says which machine this is.
    """
    machine = None
    for number, name in enumerate(names, start=1):
        title, file = f"[{number}/{len(names)}] {name}", folder / f"{name}.json"
        record: StageRecord = json.loads(file.read_text()) if file.is_file() and machine else {}
        if identity(record) != machine or record.get("verdict") not in ("PASS", "FAIL"):
            say(f"{title} ...")
            record = record_stage(name, folder, start)
        machine = machine or identity(record)
        say(f"{title}: {record['verdict']} ({record['seconds']:.0f} s) {explain(record)}")
        yield record


def identity(record: StageRecord) -> tuple[object, ...]:
    """What has to be the same for a record to stand: the machine, its libraries, the code and its sizes."""
    return tuple(record.get(key) for key in ("machine", "torch", "transformers", "code", "sizes"))


def record_stage(name: str, folder: Path, start: Start) -> StageRecord:
    """Start a stage; where it fails, the record tells how its log ends."""
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)
    before = time.perf_counter()
    status = start(name, folder)
    if status == 0 and file.is_file():
        return json.loads(file.read_text())
    error = describe_failure(status, folder / f"{name}.log")
    return {"stage": name, "verdict": "ERROR", "reason": error, "seconds": time.perf_counter() - before}


def describe_failure(status: int, log: Path) -> str:
    """The last line of a log, or the signal that ended the process."""
    if status >= 0:
        lines = log.read_text().split("\n") if log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")
    name = signal.Signals(-status).name
    return f"ended by {name}{SIGNAL_HINTS.get(name, '')}"


def explain(record: StageRecord) -> str:
    """Why a stage has its verdict, on one line."""
    goals = (f"{goal['name']}: {goal['found']} ({goal['expected']})" for goal in record.get("goals", ()))
    return record.get("reason") or "; ".join(goals)


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def write_page(records: Sequence[StageRecord]) -> str:
    """The page, in Markdown."""
    rows = [(r["stage"], f"**{r['verdict']}**", explain(r), f"{r['seconds']:.0f}") for r in records]
    stages = Table("", ("stage", "verdict", "what was found (and what is expected)", "seconds"), rows)
    tables = [Table(**table) for record in records for table in record.get("tables", ())]
    head = ["# Qualification of a machine", verdict_line(records), made_line(records)]
    return "\n\n".join([*head, *(table.markdown() for table in (stages, *tables))]) + "\n"


def made_line(records: Sequence[StageRecord]) -> str:
    """When, of which code, at which size, and how to read it."""
    models = {record["sizes"]["model"] for record in records if "sizes" in record}
    size = "the full size, random weights" if "glus_7b" in models else "the small model alone; no time is judged"
    return (
        f"Made on {time.strftime('%Y-%m-%d')} by `tools/qualify.py`, commit {run_info()['commit']}, with {size}. "
        "FAIL: measured, and not as expected. ERROR: the stage broke; its log is beside this page. absent: something "
        "is not here, nothing is wrong."
    )


def verdict_line(records: Sequence[StageRecord]) -> str:
    """All of it in a sentence."""
    machine = next((f"{r['machine']}, torch {r['torch']}" for r in records if "machine" in r), "unknown machine")
    verdicts = dict.fromkeys(MACHINE_TESTS, "not run") | {r["stage"]: r["verdict"] for r in records}
    bad, left = (
        ", ".join(name for name, verdict in verdicts.items() if verdict in kinds)
        for kinds in (("FAIL", "ERROR"), ("absent", "not run"))
    )
    found = f"do not rely on it yet ({bad})" if bad else "what was tried is as expected"
    return f"{machine}: {found}{f'; not measured here: {left}' if left else ''}."


def qualify(names: Sequence[str], folder: Path, start: Start) -> int:
    """Run the stages and write the page, also where it was interrupted.

    Returns:
        Exit status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: list[StageRecord] = []
    try:
        for record in run_stages(names, folder, start):
            records.append(record)
            write_text(folder / "qualify.md", write_page(records))
            write_text(folder / "qualify.json", json.dumps(records, indent=2) + "\n")
    except KeyboardInterrupt:
        say(f"interrupted: what is finished lies in {folder}; the same command goes on")
        return 130
    verdicts = {record["verdict"] for record in records}
    if "ERROR" not in verdicts:  # else the same command does that stage again, which may need them
        shutil.rmtree(folder / WEIGHTS_FOLDER, ignore_errors=True)
    say(f"{verdict_line(records)}\n{folder / 'qualify.md'}")
    return int(bool(verdicts & {"FAIL", "ERROR"}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/qualify"), help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=MACHINE_TESTS, metavar="STAGE", help=", ".join(MACHINE_TESTS))
    options = parser.parse_args(arguments)
    wanted = {"environment", *(options.only or MACHINE_TESTS)}
    sys.exit(qualify([name for name in MACHINE_TESTS if name in wanted], options.output, start_stage))


if __name__ == "__main__":
    main()
