"""What a run tells: log lines, metrics.jsonl (always), Weights & Biases (when asked), and run information."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

import numpy as np
import torch

from glus import __version__, distributed
from glus.config import TrainConfig, plain_config, to_yaml
from glus.console import ConsoleHandler
from glus.files import write_text
from glus.pictures import write_movie

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_PACKAGES = ("transformers", "peft", "deepspeed", "sam2", "numpy")


def setup_logging() -> None:
    """Log to the console: rank 0 from INFO on, other ranks from WARNING on, with the rank in front. What libraries say
    of their own future is not for users."""
    rank = distributed.rank()
    level, prefix = (logging.WARNING, f"[rank {rank}] ") if rank else (logging.INFO, "")
    text = f"%(asctime)s {prefix}%(message)s"
    logging.basicConfig(level=level, format=text, datefmt="%H:%M:%S", handlers=[ConsoleHandler()], force=True)
    warnings.simplefilter("ignore", FutureWarning)
    for noisy in ("httpx", "DeepSpeed", "transformers", "numba", "bitsandbytes"):  # the last at every product in 8 bits
        logging.getLogger(noisy).setLevel(logging.ERROR)


def log_to_file(folder: Path) -> None:
    """Add what is logged from now on, in this process, to ``train.log`` of a run folder, until ``setup_logging``."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)


def run_info() -> dict[str, Any]:
    """Command, commit, versions and time: what one needs to know about a run years later."""
    # An installed package may lie in the repository of another project, as in its .venv, whose commit is not its own.
    commit = _git("ls-files", Path(__file__).name) and _git("describe", "--always", "--dirty", "--abbrev=40")
    return {
        "command": sys.argv,
        "commit": commit or "unknown (no git, or not a git checkout)",
        "python": sys.version.split()[0],
        # torch as it calls itself: pip does not know the CUDA of PyPI's builds
        "versions": {"glus": __version__, "torch": torch.__version__} | {name: _version(name) for name in _PACKAGES},
        "world_size": distributed.world_size(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _git(*words: str) -> str:
    """What git says in this file's folder; nothing where it fails, or is not there, as in a slim image."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    """As pip knows it; what lies on PYTHONPATH alone it does not know."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_run_folder(folder: Path, config: object, start: int) -> None:
    """Create the run folder with the resolved ``config.yaml`` and ``run.json``; rank 0 only.

    Args:
        folder: of the run.
        config: of the run.
        start: steps already done; where a run goes on, ``run.json`` keeps its beginning and lists each continuation.
    """
    write_text(folder / "config.yaml", to_yaml(config))
    file = folder / "run.json"
    content = run_info()
    if start and file.is_file():
        before = json.loads(file.read_text())
        content = before | {"resumed": [*before.get("resumed", []), {"step": start, **content}]}
    write_text(file, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Example:
    """A sentence of a validation, to be looked at."""

    text: str
    kind: str
    scores: dict[str, float]
    """In percent, by name."""
    picture: np.ndarray
    """(H, W, 3) uint8: some frames, with the truth and the answer."""


class MetricsLog:
    """Scalars of a run by optimizer step: one JSON object a line, flushed at once; W&B beside it when asked.

    Args:
        folder: the run folder.
        config: of the run; it says whether and how to use Weights & Biases.
        is_main: only rank 0 writes.
        start: steps already done; later records of a run that was interrupted are dropped, since these steps come
            again.
    """

    def __init__(self, folder: Path, config: TrainConfig, is_main: bool, start: int = 0):
        self._file: TextIO | None = None
        self._wandb: wandb.Run | None = None
        self._shown: tuple[Sequence[Example], Sequence[np.ndarray]] = (), ()
        if is_main:
            _drop_records(folder / "metrics.jsonl", start)
            self._file = (folder / "metrics.jsonl").open("a")
        if is_main and config.trainer.wandb.enabled:
            with self._surviving_wandb("is out of reach"):
                self._wandb = _start_wandb(folder, config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of an optimizer step (counted from 1)."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._wandb is not None:
            with self._surviving_wandb("no longer takes records"), TemporaryDirectory() as scratch:
                self._wandb.log({**values, **self._take_shown(Path(scratch))}, step=step)

    def show(self, examples: Sequence[Example], movie: Sequence[np.ndarray]) -> None:
        """Add a table of sentences and a movie, (H, W, 3) uint8 frames, to W&B's next record."""
        self._shown = examples, movie

    def _take_shown(self, scratch: Path) -> dict[str, Any]:
        """What ``show`` has left, as W&B takes it: the movie by way of a file, as it encodes none itself."""
        import wandb

        (examples, movie), self._shown = self._shown, ((), ())
        shown: dict[str, Any] = {}
        if examples:
            names = list(examples[0].scores)
            rows = [[e.text, e.kind, *(e.scores[name] for name in names), wandb.Image(e.picture)] for e in examples]
            shown["valid/sentences"] = wandb.Table(["sentence", "kind", *names, "picture"], rows)
        if movie:
            write_movie(scratch / "movie.mp4", movie, frames_per_second=8)
            shown["valid/movie"] = wandb.Video(str(scratch / "movie.mp4"), format="mp4")
        return shown

    def close(self) -> None:
        """Finish the file and W&B's run."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            with self._surviving_wandb("was not finished"):
                self._wandb.finish()

    @contextmanager
    def _surviving_wandb(self, trouble: str) -> Iterator[None]:
        """Go on without W&B where it fails, and say so: a training does not depend on it."""
        import wandb  # takes a second, which no other program should wait

        try:
            yield
        except (wandb.errors.Error, OSError) as error:
            self._wandb = None
            log.warning("W&B %s (%s); training goes on, metrics.jsonl has everything", trouble, error)


def _drop_records(file: Path, start: int) -> None:
    """Keep the whole lines of steps up to ``start``; a kill may have cut the last one."""
    if not file.is_file():
        return
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= start]
    write_text(file, "".join(kept))


def _start_wandb(folder: Path, config: TrainConfig) -> wandb.Run:
    """One W&B run per run folder, however often it is interrupted: its id lies in the folder.

    W&B takes no step twice, so steps that come again after an interruption, which are equal, leave its curve alone.
    """
    import wandb

    if wandb.run is not None:  # of an earlier job of a sweep, which failed; init would give that one back
        wandb.finish()
    id_file = folder / "wandb_id"
    if not id_file.is_file():
        write_text(id_file, uuid.uuid4().hex[:8])
    options, recipe = config.trainer.wandb, config.recipe
    run = wandb.init(
        project=options.project,
        entity=options.entity,
        group=options.group,
        tags=options.tags,
        notes=options.notes or (recipe.row if recipe else None),
        config=plain_config(config),
        mode=cast('Literal["online", "offline"]', options.mode),  # checked by WandbConfig
        dir=str(folder),
        name=folder.name,
        id=id_file.read_text(),
        resume="allow",
    )
    for name in ("J", "F", "J&F"):
        run.define_metric(f"valid/{name}", summary="max")
    run.define_metric("total", summary="min")
    return run
