"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from glus import distributed
from glus.log import MetricsLog
from glus.losses.objective import GlusObjective
from glus.structures import Batch
from glus.train.engine import Engine

log = logging.getLogger(__name__)

DRAW_STREAM, DROPOUT_STREAM = 3, 4
"""Generator streams of the trainer; samples have streams of their own."""


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank that make up a global batch.

    Raises:
        ValueError: they cannot.
    """
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        raise ValueError(
            f"trainer.global_batch_size={global_batch_size} is no multiple of trainer.micro_batch_size="
            f"{micro_batch_size} x {world_size} processes = {per_pass}: change one of the two sizes"
        )
    return global_batch_size // per_pass


def micro_batches(
    first_step: int, last_step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Sample numbers of each micro-batch of a rank.

    Step s trains on samples ``s * G .. (s + 1) * G - 1`` whatever the number of ranks and accumulation steps.
    """
    accumulation = accumulation_steps(global_batch_size, micro_batch_size, world_size)
    for step in range(first_step, last_step):
        for turn in range(accumulation):
            first = step * global_batch_size + (turn * world_size + rank) * micro_batch_size
            yield list(range(first, first + micro_batch_size))


class Trainer:
    """Runs optimizer steps, measures them, evaluates and saves in between.

    Args:
        engine: model and optimizer.
        objective: the loss.
        batches: this rank's micro-batches in order, ``accumulation`` per step.
        steps: optimizer steps to run.
        accumulation: micro-batches per step.
        seed: decides dropout and contrastive draws.
        metrics: where scalars go.
        evaluate: gives named scores of the current model; called by every rank.
        save: writes a checkpoint of the given step; called by every rank.
        log_every: steps between two records.
        eval_every: steps between two evaluations; 0: only after the last step.
        save_every: steps between two checkpoints; the last step is always saved.
    """

    def __init__(
        self,
        engine: Engine,
        objective: GlusObjective,
        batches: Iterator[Batch],
        *,
        steps: int,
        accumulation: int,
        seed: int,
        metrics: MetricsLog,
        evaluate: Callable[[], dict[str, float]] | None,
        save: Callable[[int], Path],
        log_every: int,
        eval_every: int,
        save_every: int,
    ):
        self.engine = engine
        self.objective = objective
        self.batches = batches
        self.steps = steps
        self.accumulation = accumulation
        self.seed = seed
        self.metrics = metrics
        self.evaluate = evaluate
        self.save = save
        self.log_every = log_every
        self.eval_every = eval_every
        self.save_every = save_every

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            FloatingPointError: a loss is not finite; the parameters are still those of the step before.
        """
        started = time.monotonic()
        with self._progress() as progress:
            task = progress.add_task("training", total=self.steps, loss=math.nan, pace=math.nan)
            for step in range(self.steps):
                values = self.train_step(step)
                values["seconds"] = (time.monotonic() - started) / (step + 1)
                progress.update(task, advance=1, loss=values["total"], pace=values["seconds"])
                self._after(step + 1, values)
        self.metrics.close()

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step (counted from 0): the terms of the global batch, learning rate and gradient norm."""
        micro = [next(self.batches) for _ in range(self.accumulation)]
        denominators = distributed.sum_over_ranks(self.objective.counts(micro), self.engine.device)
        terms: list[dict[str, torch.Tensor]] = []
        learning_rate = self.engine.learning_rate
        for turn, batch in enumerate(micro):
            self._seed_dropout(step, turn)
            batch = batch.to(self.engine.device)
            rng = distributed.generator(self.seed, DRAW_STREAM, step, turn, distributed.rank())
            output = self.engine(batch)
            losses = self.objective(output, batch, denominators, rng)
            terms.append({name: value.detach() for name, value in losses.items()})
            if turn + 1 == self.accumulation:  # before the parameters change, and with one synchronisation per step
                self._check_finite(step, micro, terms)
            self.engine.backward(losses["total"])
            self.engine.step()
        local = {name: float(torch.stack([term[name] for term in terms]).sum()) for name in terms[0]}
        total = distributed.sum_over_ranks(local, self.engine.device)
        return {**total, "learning_rate": learning_rate, "grad_norm": self.engine.grad_norm}

    def _after(self, step: int, values: dict[str, float]) -> None:
        is_last = step == self.steps
        if step % self.log_every == 0 or step == 1 or is_last:
            self.metrics.write(step, values)
            left = time.strftime("%H:%M:%S", time.gmtime(values["seconds"] * (self.steps - step)))
            parts = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            log.info("step %d/%d  %s  left %s", step, self.steps, parts, left)
        if self.evaluate and (is_last or (self.eval_every and step % self.eval_every == 0)):
            scores = {f"valid/{name}": value for name, value in self.evaluate().items()}
            self.metrics.write(step, scores)
            log.info("step %d/%d  %s", step, self.steps, "  ".join(f"{k} {v:.2f}" for k, v in scores.items()))
        if is_last or step % self.save_every == 0:
            log.info("step %d/%d  saved %s", step, self.steps, self.save(step))

    def _check_finite(self, step: int, micro: list[Batch], terms: list[dict[str, torch.Tensor]]) -> None:
        table = torch.stack([torch.stack(list(term.values())) for term in terms])
        if bool(torch.isfinite(table).all()):
            return
        for batch, row in zip(micro, table.tolist(), strict=True):
            for name, value in zip(terms[0], row, strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"loss term {name!r} is {value} at step {step + 1} on rank {distributed.rank()}; "
                        f"samples: {', '.join(batch.names)}. Lower trainer.learning_rate, or look at these samples."
                    )

    def _seed_dropout(self, step: int, turn: int) -> None:
        key = distributed.generator(self.seed, DROPOUT_STREAM, step, turn, distributed.rank())
        torch.manual_seed(int(key.integers(2**62)))

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[pace]:.2f} s/step"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, disable=distributed.rank() != 0)
        progress.disable = progress.disable or not progress.console.is_terminal
        return progress
