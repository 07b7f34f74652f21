"""What programs have in common at their entry: paths, printing, and jobs, one or those of a sweep (``-m``)."""

from __future__ import annotations

import argparse
import gc
import io
import logging
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glus.config.loading import load_config
from glus.config.overrides import check_overrides, print_help
from glus.console import log_to_console, tables
from glus.files import PROJECT, check_target, expanded

log = logging.getLogger(__name__)

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
"""What a user can mend, by the message."""
_Task = Callable[..., int | None]
_Conclude = Callable[[dict[str, Any], Collection[str]], None]
"""See ``Jobs.run``."""


def escape_output() -> None:
    """Print what a terminal cannot show as escapes, as stderr does; a sentence would end the program otherwise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with ``error: ...`` and exit status 1 at what a user can mend; for programs without ``Jobs``."""
    escape_output()
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


def user_path(text: str) -> Path:
    """A path of the command line, whose ``~`` no shell expands in ``--output=~/here``; for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class _Job:
    """What Hydra has made ready: a config, and where and how its task is to run."""

    number: int
    config: Any
    beside: tuple[object, ...]
    folder: str
    variables: dict[str, str]


class Jobs:
    """What Hydra composes, run when it is through.

    So all configs of a sweep are known before the first job begins, and what ends a job does not end the others.
    Outputs that several jobs would share become ``<output>/0``, ``<output>/1``, ... (files: ``<folder>/0/<file>``).
    ``dataset=[a,b]`` is a sweep over splits, in which jobs are called ``a`` and ``b`` instead.

    Args:
        program: name of its file in ``configs``.
        schema: of its config.
        output: the key of the config that says where a job writes; empty: it writes nothing.
        is_file: whether that is a file.
        reads: the key that says what a job reads that a program writes for each of several splits.
    """

    def __init__(self, program: str, schema: type, output: str = "", is_file: bool = False, reads: str = ""):
        self._program, self._schema, self._output, self._is_file = program, schema, output, is_file
        self._reads, self._datasets = reads, list[str]()
        self._finished: list[str] = []
        self._about: str | None = None
        self._jobs: list[_Job] = []
        self._told = self._status = 0

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Print an error that a user can mend as a line, and go on; the exit status will be 1."""
        try:
            yield
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self._status = 1
        self._told += 1

    def take(self, cfg: Any, *beside: Callable[[Any], object]) -> None:
        """Read the config of a job, or where ``--help`` was asked for, print that.

        Args:
            cfg: as Hydra composed it.
            beside: functions of the typed config, whose results the task takes besides.
        """
        with self.telling():
            if self._about is not None:
                values = OmegaConf.to_container(
                    OmegaConf.merge(OmegaConf.structured(self._schema), cfg), enum_to_str=True
                )
                print_help(tables(), self._program, self._schema, self._about, values)
            else:
                config: Any = load_config(self._schema, cfg)
                self.add(config, *(make(config) for make in beside))

    def add(self, config: object, *beside: object) -> None:
        """Take a job, within ``telling``; the task of ``run`` will be called with these."""
        self._jobs.append(_Job(self._told, config, beside, os.getcwd(), dict(os.environ)))

    def run(self, compose: Callable[[], object], task: _Task, conclude: _Conclude | None = None) -> None:
        """Run a task for every job, then leave the program.

        Args:
            compose: calls ``take`` or ``add`` for each of them.
            task: may return an exit status.
            conclude: is called in the end with the configs of several splits, by their names, and the names of those
                that came to their end.

        Raises:
            SystemExit: with the highest exit status. A task that raises it itself ends the whole sweep.
        """
        escape_output()
        # Hydra's grammar knows no tilde outside quotes, and no ampersand, as of J&F.
        tilde = re.compile(r"(?<=[=,\s])~[\w.-]*/")
        sys.argv[1:] = [tilde.sub(lambda found: os.path.expanduser(found[0]), argument) for argument in sys.argv[1:]]
        sys.argv[1:] = [re.sub(r"=([\w./-]*&[\w./&-]*)$", r"='\1'", argument) for argument in sys.argv[1:]]
        if {"--help", "-h"} & set(sys.argv[1:]):
            sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ("--help", "-h")]
            self._about = sys.modules["__main__"].__doc__
        try:
            check_overrides(self._program, self._schema, sys.argv[1:])
            self._spread_datasets()
        except ValueError as error:
            sys.exit(f"error: {error}")
        record = Path("multirun.yaml")  # Hydra's, of a sweep, in the folder where the user is
        is_kept = record.exists()
        compose()
        log_to_console()
        if not is_kept:
            record.unlink(missing_ok=True)
        if self._datasets and self._told > len(self._datasets):
            sys.exit(f"error: dataset=[{','.join(self._datasets)}]: expected no other sweep beside it")
        self._part(self._output, self._is_file)
        if self._datasets:
            self._part(self._reads, is_file=False)
        self._run(self._jobs, task)
        if self._datasets and conclude:
            conclude({self._name(job): job.config for job in self._jobs}, self._finished)
        sys.exit(self._status)

    def start(self, task: _Task, conclude: _Conclude | None = None, take: Callable[[Any], None] | None = None) -> None:
        """``run``, with configs that Hydra composes of the program's file, its schema and the command line.

        Args:
            task, conclude: see ``run``.
            take: takes each of them; default: ``take``.
        """
        import hydra  # at the entry alone
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store("schema", self._schema)
        compose = hydra.main(version_base="1.3", config_path=str(PROJECT / "configs"), config_name=self._program)
        self.run(compose(take or self.take), task, conclude)

    def _spread_datasets(self) -> None:
        """Make a sweep of ``dataset=[a,b]``, which Hydra would compose into one split.

        Raises:
            ValueError: a split stands there twice, or in a sweep.
        """
        found = [argument for argument in sys.argv[1:] if re.fullmatch(r"dataset=\[.+\]", argument)]
        if not found:
            return
        names = [name.strip(" '\"") for name in found[-1].removeprefix("dataset=[")[:-1].split(",")]
        rest = [argument for argument in sys.argv[1:] if not argument.startswith("dataset=")]
        if {"-m", "--multirun"} & set(rest) or len(set(names)) < len(names):
            raise ValueError(f"{found[-1]}: expected each split once, and no -m beside it")
        if any(argument.startswith(("--cfg", "-c")) for argument in rest):  # which shows one config
            sys.argv[1:] = [f"dataset={names[0]}", *rest]
        else:
            sys.argv[1:] = [f"dataset={','.join(names)}", "hydra.mode=MULTIRUN", *rest]
            logging.getLogger("hydra").setLevel(logging.WARNING)  # its numbers of jobs mean nothing here
            self._datasets = names

    def _name(self, job: _Job) -> str:
        return self._datasets[job.number] if self._datasets else str(job.number)

    def _part(self, key: str, is_file: bool) -> None:
        """Give jobs that have the same path in ``key`` paths of their own."""
        paths = {job.number: str(getattr(job.config, key, None) or "") for job in self._jobs}
        having = [job for job in self._jobs if paths[job.number]]
        places = [os.path.realpath(os.path.join(job.folder, paths[job.number])) for job in having]
        counts = Counter(places)
        for job, place in zip(having, places, strict=True):
            if counts[place] > 1 or len(self._datasets) > 1:
                path, name = Path(paths[job.number]), self._name(job)
                own = path.parent / name / path.name if is_file else path / name
                setattr(job.config, key, str(own))

    def _run(self, jobs: Sequence[_Job], task: _Task) -> None:
        for position, job in enumerate(jobs):
            gc.collect()  # a model of the job before may hang in a circle of references
            os.environ |= job.variables
            os.chdir(job.folder)
            try:
                with self.telling():
                    place = getattr(job.config, self._output, None) or ""  # "" where it writes nothing
                    if place:
                        check_target(Path(place), self._is_file)
                    if len(self._jobs) > 1:
                        log.info("job %s: %s", self._name(job), place)
                    self._status = max(self._status, task(job.config, *job.beside) or 0)
                    self._finished.append(self._name(job))
            except Exception as error:  # whatever it is: the other jobs are run, then it goes on unchanged
                if jobs[position + 1 :]:
                    log.exception("job %s has failed; the others follow", self._name(job))
                    traceback.clear_frames(error.__traceback__)  # which hold the model of the job, perhaps on a GPU
                    self._run(jobs[position + 1 :], task)
                raise
