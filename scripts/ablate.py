"""Ablate the small model: train rows that differ by one thing, several seeds each, and test what they were to show.

    python scripts/ablate.py
    python scripts/ablate.py ablation=inference seeds=[0] start=assets/glus_shapes

Rows and claims are in ``configs/ablation``. Rows start from one model, unless one has a ``pretrain`` of its own, and
see the same samples. The same command goes on after a kill; started several times, on machines that share a disk, the
commands share the work. All tables, every sentence's score and a page go into ``output``; it prints where they are.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from glus.config import AblateConfig, AblationRow, Missing, StartFrame
from glus.config.jobs import Jobs
from glus.data.benchmarks.index import read_expressions
from glus.evaluation.ablation import AblationTables, ablation_section
from glus.evaluation.baselines import compare_predictions
from glus.evaluation.page import build_page
from glus.evaluation.report import print_rows, write_report
from glus.evaluation.runs import read_runs
from glus.evaluation.score import score_predictions
from glus.files import PROJECT, read_object, write_text
from glus.inference.key_frames import read_key_frames, write_key_frames
from glus.models.glus import memory_frames
from glus.models.hub import find_model

SECONDS_UNTIL_NEXT_LOOK = 1.0
"""At what other programs have finished."""
LINES_OF_LOG = 15
"""That the error of a program shows."""


@dataclass(frozen=True)
class Task:
    """A folder, and the programs that fill it one after another."""

    folder: Path
    needs: tuple[Path, ...]
    """Folders of other tasks."""
    commands: tuple[tuple[str, ...], ...]
    prepare: Callable[[], None] | None = None
    """Called before them."""

    def is_done(self) -> bool:
        """Whether they have all run.

        Raises:
            ValueError: other commands have.
        """
        file, wanted = self.folder / "done.json", [list(command) for command in self.commands]
        if not file.is_file():
            return False
        found = read_object(file)["commands"]
        if found != wanted:
            changed = sorted({w for c in wanted for w in c} ^ {w for c in found for w in c})
            raise ValueError(
                f"{self.folder} was made otherwise ({', '.join(changed)}); choose another output, or delete this folder"
            )
        return True

    def run(self, environment: dict[str, str]) -> bool:
        """Run them, unless another process does so right now; returns whether it could.

        Raises:
            ChildProcessError: one of them failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock, (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.is_done():
                return True
            if self.prepare:
                self.prepare()
            for command in self.commands:
                program = [sys.executable, str(PROJECT / command[0]), *command[1:]]
                # Programs inherit the lock: one that outlives this process still has it.
                held = [lock.fileno()]
                done = subprocess.run(program, env=environment, pass_fds=held, stdout=log, stderr=log, check=False)
                if done.returncode:
                    last = Path(log.name).read_text(encoding="utf-8").splitlines()[-LINES_OF_LOG:]
                    raise ChildProcessError("\n".join([f"{command[0]} failed, see {log.name}:", *last]))
            write_text(self.folder / "done.json", json.dumps({"commands": self.commands}, indent=1) + "\n")
        return True


def run_tasks(tasks: Sequence[Task], processes: int, gpus: int) -> None:
    """Run all of them, ``processes`` at a time, each when what it needs is there.

    Raises:
        ChildProcessError: a program failed; those that ran beside it are finished, and no other one is begun.
        ValueError: see ``Task.is_done``.
    """
    by_folder, failed, start = {task.folder: task for task in tasks}, list[str](), time.monotonic()

    def work(number: int) -> None:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
        environment |= {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}
        while not failed and (pending := [task for task in tasks if not task.is_done()]):
            ready = (task for task in pending if all(by_folder[folder].is_done() for folder in task.needs))
            try:
                ran = next((task for task in ready if task.run(environment)), None)
            except BaseException:
                failed.append("no other task is begun")
                raise
            if ran is None:
                time.sleep(SECONDS_UNTIL_NEXT_LOOK)
            else:
                minutes = (time.monotonic() - start) / 60
                print(f"{minutes:6.1f} min  {ran.folder}  ({len(pending) - 1} tasks left)", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        for finished in [pool.submit(work, number) for number in range(processes)]:
            finished.result()


def plan_tasks(config: AblateConfig) -> list[Task]:
    """Shapes where it is missing, start, trainings and predictions, in the order in which they are best begun."""
    output, ablation, root = Path(config.output), config.ablation, Path(config.dataset.root)
    paths = [f"paths.data={config.paths.data}", f"paths.weights={config.paths.weights}"]
    data = f"data.mixture.shapes.dataset.root={root}"
    train = ["scripts/train.py", "experiment=shapes", "valid=null", *paths, data, *ablation.train]
    tasks, made = list[Task](), tuple[Path, ...]()
    # The held-out split is written last.
    if not (root / config.dataset.split).is_dir():
        made = (output / "data",)
        tasks.append(Task(made[0], (), (("tools/make_shapes.py", str(root)),)))
    changes = {name: list(row.train) for name, row in ablation.rows.items()}

    def start(folder: Path, needs: tuple[Path, ...], overrides: Sequence[str]) -> tuple[tuple[Path, ...], Path]:
        """What a row that begins with it needs, and the model."""
        steps, run = config.start_steps, folder / "run"
        own = (*overrides, f"trainer.steps={steps}", f"trainer.save_every={steps}", f"output={run}")
        tasks.append(Task(folder, needs, ((*train, *ablation.start, *own),)))
        return (folder,), run / "checkpoints" / f"step_{steps}"

    starts = dict[str, tuple[tuple[Path, ...], Path]]()
    for name, row in ablation.rows.items():
        if row.pretrain:
            tower = output / name / "tower"
            pretrain = ("tools/pretrain_towers.py", "parts=[llm]", *paths, *row.pretrain, f"output={tower}")
            tasks.append(Task(tower, (), (pretrain,)))
            changes[name].append(f"model.llm.weights={tower / 'llm'}")
            starts[name] = start(output / name / "start", (*made, tower), changes[name])
    shared = start(output / "start", made, ()) if config.start is None else (made, find_model(config.start))
    for seed in config.seeds:
        for name, row in ablation.rows.items():
            if row.of is None:
                needs, begin = starts.get(name, shared)
                folder = _folder(config, name, seed) / "training"
                given = (f"model.weights={begin}", f"model.llm.tokenizer={begin}", *changes[name])
                given += (f"trainer.steps={config.steps}", f"trainer.save_every={config.steps}")
                own = (*train, *given, f"trainer.seed={seed}", f"output={folder / 'run'}")
                tasks.append(Task(folder, needs, (own,)))
            tasks.append(_prediction(config, name, row, seed))
    return tasks


def _folder(config: AblateConfig, row: str, seed: int) -> Path:
    return Path(config.output) / row / f"seed_{seed}"


def _start_frames(config: AblateConfig, row: str, seed: int) -> Path:
    return _folder(config, row, seed) / "frames" / "key_frames.json"


def _prediction(config: AblateConfig, name: str, row: AblationRow, seed: int) -> Task:
    """Of a row's model, from the frames that the row starts at."""
    training, folder = _folder(config, row.of or name, seed) / "training", _folder(config, name, seed)
    split = [f"dataset={config.dataset.name}", f"dataset.root={config.dataset.root}", f"weights={training / 'run'}"]
    split += [] if config.max_videos is None else [f"max_videos={config.max_videos}"]
    predict = ["scripts/predict.py", *split, *row.predict, "format=rle", f"output={folder / 'predictions'}"]
    file = _start_frames(config, name, seed)
    commands, prepare = [], None
    if row.start is StartFrame.chosen:
        commands.append(("scripts/score_frames.py", *split, f"output={file.parent}"))
    elif row.start is not StartFrame.first:
        prepare = partial(write_start_frames, config, row.start, seed, file)
    if row.start is not StartFrame.first:
        predict.append(f"inference.key_frames={file}")
    return Task(folder, (training,), (*commands, tuple(predict)), prepare)


def write_start_frames(config: AblateConfig, start: StartFrame, seed: int, file: Path) -> None:
    """A file of key frames that nobody chose."""
    rng = np.random.default_rng(seed)
    lengths = [(e, len(e.frames)) for e in read_expressions(config.dataset)]
    file.parent.mkdir(parents=True, exist_ok=True)
    is_random = start is StartFrame.random
    write_key_frames(file, [(e, int(rng.integers(count)) if is_random else count // 2) for e, count in lengths])


def tabulate(config: AblateConfig) -> tuple[AblationTables, list[Path]]:
    """Read all predictions of the ablation, and write what follows from them; returns also the files."""
    output, rows = Path(config.output), config.ablation.rows
    folders = {f"{row}/{seed}": _folder(config, row, seed) / "predictions" for row in rows for seed in config.seeds}
    expressions = read_expressions(config.dataset)
    given = [name for name, row in rows.items() if row.start in (StartFrame.middle, StartFrame.random)]
    starts = {
        f"{row}/{seed}": read_key_frames(_start_frames(config, row, seed), expressions)
        for row in given
        for seed in config.seeds
    }
    compared = compare_predictions(config.dataset, folders, config.processes, config.max_videos, starts)
    results = {row: [compared[f"{row}/{seed}"] for seed in config.seeds] for row in rows}
    tables = AblationTables(config.ablation, results)
    contents = {"summary": tables.summary, "claims": tables.claims(), "curves": tables.curves()}
    written = []
    for name, content in {**contents, "scores": tables.scores()}.items():
        written.append(output / f"{name}.json")
        write_text(written[-1], json.dumps(content, indent=None if name == "scores" else 1, allow_nan=False) + "\n")
    first = [folders[f"{row}/{config.seeds[0]}"] for row in rows]
    for folder in first:  # in this process: it takes less time than starting others
        report = score_predictions(config.dataset, folder, Missing.error, max_videos=config.max_videos)
        write_report(report, folder)
    runs = [replace(run, label=row) for run, row in zip(read_runs(first), rows, strict=True)]
    page = build_page(config.dataset, runs, memory_frames, config.num_sentences, ablation_section(tables))
    written.append(output / "ablation.html")
    write_text(written[-1], page)
    return tables, written


def ablate(config: AblateConfig) -> int:
    """Run what is missing, tabulate and print.

    Returns:
        The exit status: 1 where a claim failed.

    Raises:
        ChildProcessError: a program failed.
        ValueError: ``output`` holds runs with other settings.
    """
    tasks = plan_tasks(config)
    print(f"{len(tasks)} tasks, {config.processes} at a time", flush=True)
    run_tasks(tasks, config.processes, config.gpus)
    tables, written = tabulate(config)
    console = Console(width=None if sys.stdout.isatty() else 200)
    print_rows(console, "J&F in percent, mean ± sd over seeds", "row", tables.printed())
    if differences := tables.differences():
        print_rows(console, "differences, 95 % interval over videos and seeds", "rows", differences)
    for verdict in tables.verdicts:
        console.print(verdict.text(), markup=False, highlight=False)
    print(*written, sep="\n")
    return int(any(verdict.has_passed is False for verdict in tables.verdicts))


if __name__ == "__main__":
    Jobs("ablate", AblateConfig, "output").start(ablate)
