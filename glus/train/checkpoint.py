"""Checkpoints: complete or absent, elastic, and no larger than what is trained with its optimizer state.

``<run>/checkpoints/step_N/`` is a model folder (``load_model`` reads it) with the state of training beside it:

===========================  ============================================================================
``trained.safetensors``      the trained parameters: the optimizer's float32 master weights, stored once
``exp_avg(_sq).safetensors`` AdamW's two moments, float32, under the same names
``queue.safetensors``        entries of the contrastive queue of every rank, if that loss is on
``training.json``            step, counters, and the config that the result depends on
``config.yaml``, tokenizer   what the model is built from
===========================  ============================================================================

Beside them ``best`` is a link to the one with the highest ``trainer.keep_best``, where that is set.

All else is a function of the seed, the step and the rank: the learning rate, the samples, and every random draw.
Tensors are whole, so that any number of processes and any ZeRO stage can load them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from glus import distributed
from glus.config import TrainConfig, leaves, load_config, plain_config
from glus.losses.contrastive import ContrastiveQueue, QueueEntry, merge_entries
from glus.models.pretrained import BEST_LINK, TRAINED_FILE, current_names, list_steps
from glus.models.weight_files import SafetensorsFile
from glus.train.engine import Engine, OptimizerTensor
from glus.types import ObjectKey

log = logging.getLogger(__name__)

FILES = {
    OptimizerTensor.master: TRAINED_FILE,
    OptimizerTensor.exp_avg: "exp_avg.safetensors",
    OptimizerTensor.exp_avg_sq: "exp_avg_sq.safetensors",
}
QUEUE_FILE = "queue.safetensors"
_LEFTOVER = re.compile(r"step_[0-9]+(\.removed)?\.tmp")


@dataclass
class RunState:
    """Where a run stands after ``step`` optimizer steps; equal on all ranks."""

    step: int = 0
    """Steps done, those that were skipped included; they used up samples 0 .. step * global_batch_size - 1."""
    skipped: int = 0
    """Steps left out because a loss or gradient was not finite."""
    skipped_in_row: int = 0
    drawn: dict[str, float] = field(default_factory=dict)
    """Samples drawn so far from each dataset."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps, the oldest first: what a spike is measured against."""
    score: float | None = None
    """``trainer.keep_best`` at this step; None if it was not evaluated here."""
    best: float | None = None
    """The highest so far."""


class Checkpoints:
    """Writes, finds and reads the checkpoints of a run. Every method is called by every rank.

    Args:
        run: the run folder.
        engine: model and optimizer.
        queue: of the contrastive loss; None without.
        config: of the run; a checkpoint resumes only under one that gives the same result.
        write_model_config: writes all files of a model folder but its weights.
    """

    def __init__(
        self,
        run: Path,
        engine: Engine,
        queue: ContrastiveQueue | None,
        config: TrainConfig,
        write_model_config: Callable[[Path], None],
    ):
        self._folder = run / "checkpoints"
        self._engine = engine
        self._queue = queue
        self._config = config
        self._write_model_config = write_model_config

    def save(self, state: RunState) -> Path:
        """Write a checkpoint beside its place, rename it, then remove those that are not to be kept.

        Raises:
            OSError: it could not be written, on any rank; nothing is left of it, and the earlier ones are untouched.
        """
        folder = self._folder / f"step_{state.step}"
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            distributed.on_main(lambda: self._start(temporary))
            for kind, name in FILES.items():
                self._write_tensors(temporary / name, kind)
            entries = self._queue.entries if self._queue else ()
            queues = distributed.gather([replace(entry, embed=entry.embed.cpu()) for entry in entries])
            distributed.on_main(lambda: self._finish(temporary, folder, state, queues))
        except OSError as error:
            if distributed.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            earlier = list_checkpoints(self._folder.parent)
            raise OSError(
                f"checkpoint {folder} cannot be written: {error}. "
                + (f"{earlier[-1]} is complete: " if earlier else "There is no earlier one. ")
                + "make room (a smaller trainer.keep_last?), then start the same command again, which goes on there"
            ) from error
        return folder

    def load(self, folder: Path) -> RunState:
        """Bring model, optimizer and queue into the state of a checkpoint.

        Written by another number of processes, the ranks' queues are merged in the global order of samples, and each
        rank goes on with the newest entries of that.

        Raises:
            ValueError: a file is damaged, or does not hold exactly what this model trains.
        """
        content = read_state(folder)
        for kind, name in FILES.items():
            self._read_tensors(folder / name, kind)
        self._engine.set_updates(content["updates"])
        if self._queue is not None:
            queues = _read_queues(folder / QUEUE_FILE, content["world_size"], self._engine.device)
            is_same = len(queues) == distributed.world_size()
            self._queue.restore(queues[distributed.rank()] if is_same else merge_entries(queues))
        return RunState(**content["state"])

    def _start(self, temporary: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("step_*.tmp"):  # of a run that was killed while it wrote or removed
            if _LEFTOVER.fullmatch(leftover.name):
                try:
                    shutil.rmtree(leftover)
                except OSError as error:  # as in removing an old one; where this name is wanted itself, mkdir fails
                    log.warning("%s cannot be removed yet: %s", leftover, error)
        temporary.mkdir()
        self._write_model_config(temporary)

    def _write_tensors(self, path: Path, kind: OptimizerTensor) -> None:
        """Rank 0 writes; reading is collective and goes on to its end even if the disk is full."""
        file: SafetensorsFile | None = None
        failures: list[OSError] = []
        for tensor in self._engine.read_tensors(kind):
            if distributed.rank() == 0 and not failures:
                try:
                    file = file or SafetensorsFile(path, float32_layout(self._engine.shapes()))
                    file.append(tensor.float().cpu())
                except OSError as error:
                    failures.append(error)
        distributed.on_main(lambda: _close(file, failures))

    def _finish(self, temporary: Path, folder: Path, state: RunState, queues: list[list[QueueEntry]]) -> None:
        if self._queue is not None:
            _write_queues(temporary / QUEUE_FILE, queues)
        content = {
            "state": asdict(state),
            "updates": self._engine.updates,
            "world_size": len(queues),
            "config": plain_config(self._config),
        }
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        os.replace(temporary, folder)
        _sync(self._folder)
        if self._config.trainer.keep_best:
            self._link_best()
        self._prune()

    def _link_best(self) -> None:
        """Let ``best`` be a link to the best checkpoint; relative, so that a run may be moved."""
        best, link = best_checkpoint(self._folder.parent), self._folder / BEST_LINK
        temporary = link.with_name(f"{BEST_LINK}.tmp")
        if best is not None:
            try:
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(best.name)
                os.replace(temporary, link)
            except OSError as error:  # there are file systems without links; the checkpoint itself is complete
                log.warning("%s is the best so far, but %s cannot be a link to it: %s", best, link, error)

    def _prune(self) -> None:
        """Remove all but the newest and, if that is asked for, the best."""
        trainer = self._config.trainer
        for folder in superfluous(self._folder.parent, trainer.keep_last, bool(trainer.keep_best)):
            if folder.is_symlink():  # somebody moved it
                continue
            removed = folder.with_name(folder.name + ".removed.tmp")
            try:
                os.replace(folder, removed)  # so that what is half removed is never taken for complete
                shutil.rmtree(removed)
            except OSError as error:  # NFS keeps what another process reads; the next save removes what is left
                log.warning("%s cannot be removed yet: %s", folder, error)

    def _read_tensors(self, path: Path, kind: OptimizerTensor) -> None:
        shapes = self._engine.shapes()
        with _opened(path) as file:
            stored = current_names({name: name for name in file.keys()})  # noqa: SIM118
            found = {name: tuple(file.get_slice(own).get_shape()) for name, own in stored.items()}
            wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
            if wrong:
                raise ValueError(
                    f"{path} does not fit: {len(wrong)} tensors are missing, unexpected or of another shape, "
                    f"first {wrong[0]}: {found.get(wrong[0])} in the file, the model has {shapes.get(wrong[0])}"
                )
            self._engine.write_tensors(kind, lambda name: file.get_tensor(stored[name]))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of a checkpoint, to read tensors of.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove {path.parent} to go on from an earlier checkpoint"
        ) from error


def float32_layout(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of a file of a checkpoint: shapes with their type."""
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


def _close(file: SafetensorsFile | None, failures: list[OSError]) -> None:
    if failures:
        raise failures[0]
    assert file is not None, "a model without trained parameters"
    file.close()


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, down to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write_queues(path: Path, queues: list[list[QueueEntry]]) -> None:
    entries = [(rank, entry) for rank, queue in enumerate(queues) for entry in queue]
    keys = [[k.dataset, k.video, k.exp_id, k.frame, sorted(k.object_ids)] for k in (entry.key for _, entry in entries)]
    tensors = {
        "rank": torch.tensor([rank for rank, _ in entries], dtype=torch.int64),
        "position": torch.tensor([entry.position for _, entry in entries], dtype=torch.int64).view(-1, 2),
        "embed": torch.stack([entry.embed for _, entry in entries]) if entries else torch.zeros(0, 0),
    }
    path.write_bytes(save(tensors, {"keys": json.dumps(keys)}))


def _read_queues(path: Path, world_size: int, device: torch.device) -> list[list[QueueEntry]]:
    """Entries of each of the ``world_size`` ranks that wrote them, the oldest first."""
    with _opened(path) as file:
        keys = json.loads(file.metadata()["keys"])
        ranks, positions = file.get_tensor("rank").tolist(), file.get_tensor("position").tolist()
        embeds = file.get_tensor("embed").to(device)
    queues: list[list[QueueEntry]] = [[] for _ in range(world_size)]
    rows = zip(ranks, positions, keys, embeds, strict=True)
    for rank, position, (dataset, video, exp_id, frame, objects), embed in rows:
        key = ObjectKey(dataset, video, exp_id, frame, frozenset(objects))
        queues[rank].append(QueueEntry((position[0], position[1]), key, embed))
    return queues


STATE_FILE = "training.json"
SAME_RESULT = (
    *("hardware", "hardware.*", "recipe", "recipe.*", "allow_cpu"),
    *("output", "paths.*", "valid", "valid.*", "inference.*", "data.num_workers"),
    *("trainer.micro_batch_size", "trainer.zero_stage", "trainer.gradient_checkpointing", "trainer.offload"),
    "trainer.compile",
    *("trainer.log_every", "trainer.eval_every", "trainer.eval_max_videos", "trainer.wandb.*"),
    *("trainer.save_every", "trainer.save_every_minutes", "trainer.keep_*", "trainer.resume"),
    *("trainer.on_nonfinite", "trainer.max_skips_in_row", "trainer.spike_ratio", "trainer.hang_timeout_minutes"),
    *(f"data.mixture.*.dataset.{name}" for name in ("root", "expected.*", "sha256.*", "protocol", "official_missing")),
)
"""Config keys that may change between two parts of a run: where things lie, what is published and how masks are scored,
and how the same steps are computed (the third and fourth line change rounding, and what depends on the rank: dropout
and the contrastive queue)."""


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run that training can go on from, by step, the newest last."""
    return [folder for folder in list_steps(run) if (folder / STATE_FILE).is_file()]


def superfluous(run: Path, keep_last: int, keep_best: bool) -> list[Path]:
    """Checkpoints that are not to be kept: all but the newest and, if asked for, the best."""
    found = list_checkpoints(run)
    keep = {*found[-keep_last:], best_checkpoint(run) if keep_best else None}
    return [folder for folder in found if folder not in keep]


def best_checkpoint(run: Path) -> Path | None:
    """Of those that ``trainer.keep_best`` was measured at, the highest, of equals the earliest; None: there is none."""
    scores = {folder: read_state(folder)["state"]["score"] for folder in list_checkpoints(run)}
    scored = [folder for folder, score in scores.items() if score is not None]
    return max(scored, key=lambda folder: scores[folder], default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """``training.json`` of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        return {name: content[name] for name in ("state", "updates", "world_size", "config")}
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder} is no checkpoint to go on from: {STATE_FILE}: {error!r}") from error


def find_start(config: TrainConfig) -> Path | None:
    """The checkpoint that ``trainer.resume`` asks to go on from; None: begin anew.

    Raises:
        FileNotFoundError: a path that holds no checkpoint.
        ValueError: ``resume=never`` beside checkpoints, a path to an older one of the same run, or a checkpoint whose
            config gives other results; the message names the keys.
    """
    run, resume = Path(config.output), config.trainer.resume
    own = list_checkpoints(run)
    if resume == "never" and own:
        raise ValueError(
            f"output={run} has checkpoints up to {own[-1].name}, but trainer.resume=never: "
            "choose another output, remove them, or set trainer.resume=auto to go on"
        )
    if resume in ("auto", "never") or (own and Path(resume).resolve() == run.resolve()):
        start = own[-1] if own else None
    else:
        start = _named_start(Path(resume), own)
    if start is not None:
        _check_config(start, config)
    return start


def _named_start(path: Path, own: list[Path]) -> Path:
    found = [path] if (path / STATE_FILE).is_file() else list_checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"trainer.resume={path}: neither auto, never, nor a checkpoint with {STATE_FILE}, nor a run that has one"
        )
    places = [folder.resolve() for folder in own]
    newer = own[places.index(found[-1].resolve()) + 1 :] if found[-1].resolve() in places else []
    if newer:
        names = ", ".join(folder.name for folder in newer)
        raise ValueError(f"trainer.resume={path}: remove the newer checkpoints of this run first: {names}")
    return own[-1] if own else found[-1]


def _check_config(folder: Path, config: TrainConfig) -> None:
    content = read_state(folder)["config"]
    cache = content["data"].get("feature_cache")  # a setting of before 2026-11-29; where it was used, samples differed
    if cache is not None and cache["folder"] is None:
        del content["data"]["feature_cache"]
    if "output_dir" in content:  # names of before 2026-11-30
        content["output"] = content.pop("output_dir")
    content["trainer"].pop("eval_videos", None)
    saved = load_config(TrainConfig, OmegaConf.create(content))  # fills in fields added since
    before, now = leaves(plain_config(saved)), leaves(plain_config(config))
    differing = [
        f"{key}={now.get(key)!r} (was {before.get(key)!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(fnmatchcase(key, pattern) for pattern in SAME_RESULT)
    ]
    if differing:
        raise ValueError(
            f"{folder} was made under a config that gives other results: {'; '.join(differing)}. "
            f"Restore these values to go on, or start a new run from it: model.weights={folder} output=NEW_FOLDER"
        )
