"""The training loop."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from glus import distributed
from glus.batch import Batch
from glus.config import OnNonfinite, TrainerConfig
from glus.console import console
from glus.data.loader import Batches
from glus.log import MetricsLog
from glus.losses.objective import TERMS, GlusObjective
from glus.train.checkpoint import Checkpoints, RunState
from glus.train.engine import Engine
from glus.train.guards import HangWatch, Preemption

log = logging.getLogger(__name__)

DRAW_STREAM, DROPOUT_STREAM = 3, 4
"""Generator streams of the trainer; samples have streams of their own."""
SPIKE_WINDOW, SPIKE_MIN_STEPS = 50, 10
"""Steps in the running median of the loss, and how many it needs before it judges."""
LOADER_PATIENCE_SECONDS = 5.0
"""How long after a signal samples are still waited for."""
MAX_LINE = 100
"""Characters of a step's line; the clock before it takes nine more."""
MAX_CAUSES = 8
"""Non-finite terms and gradients that a message lists."""


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


def spike(losses: Sequence[float], latest: float) -> float:
    """The loss relative to the median of those before it; 1 as long as these are few.

    Args:
        losses: of earlier steps.
        latest: of this step.
    """
    if len(losses) < SPIKE_MIN_STEPS:
        return 1.0
    median = statistics.median(losses)
    return latest / median if median > 0 else math.inf


def drawn_samples(batches: Sequence[Batch], names: Sequence[str]) -> dict[str, float]:
    """Number of samples (videos) of each dataset in micro-batches; ``names`` are all datasets of the mixture."""
    counts = dict.fromkeys(names, 0.0)
    for batch in batches:
        videos = batch.video_index.tolist()
        for video in set(videos):
            counts[batch.object_keys[videos.index(video)][0].dataset] += 1
    return counts


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Each count divided by their sum."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def speed(videos: int, seconds: float, peak: float | None) -> dict[str, float]:
    """Videos per second, and model FLOPs utilisation: the share that they are of the ``peak``, if that is known."""
    rate = videos / seconds
    return {"samples_per_second": rate, **({"mfu": rate / peak} if peak else {})}


def step_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """A step on a line of at most ``MAX_LINE`` characters: the loss, its terms as far as they fit, and the time.

    Args:
        step: counted from 1.
        steps: of the run.
        values: as ``Trainer.train_step`` gives them, with the ``seconds`` of a step. All of them are in metrics.jsonl.
    """
    left = timedelta(seconds=round(values["seconds"] * (steps - step)))
    end = f"  {values['seconds']:.2f} s/step  {left} left"
    line = f"step {step}/{steps}  " + (f"loss {values['total']:.4g}" if "total" in values else "skipped")
    for name in (*TERMS, "contrastive"):
        part = f"  {name} {values.get(name, 0.0):.3g}"
        if name in values and len(line + part + end) <= MAX_LINE:
            line += part
    return line + end


@dataclass(eq=False)
class Trainer:
    """Runs optimizer steps, measures them, evaluates and saves in between.

    Args:
        engine: model and optimizer.
        objective: the loss.
        batches: this rank's micro-batches in order, ``accumulation`` per step, from the first step to run.
        settings: of the loop.
        state: where the run stands; goes on from there.
        accumulation: micro-batches per step.
        asked_shares: dataset of the mixture -> share of the samples it was given.
        metrics: where scalars go.
        checkpoints: where to save.
        evaluate: gives named scores of the current model; called by every rank.
        peak: videos per second that all devices could train on at most (``plan.peak_videos_per_second``), if known.
    """

    engine: Engine
    objective: GlusObjective
    batches: Batches
    _: KW_ONLY
    settings: TrainerConfig
    state: RunState
    accumulation: int
    asked_shares: dict[str, float]
    metrics: MetricsLog
    checkpoints: Checkpoints
    evaluate: Callable[[], dict[str, float]] | None
    peak: float | None = None

    def __post_init__(self) -> None:
        self._preemption = Preemption()
        self._watch = HangWatch(self.settings.hang_timeout_minutes, distributed.rank())
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        self._is_stopping = self._is_saving = False
        self._durations: list[float] = []
        """Seconds of the steps since the last record."""

    def fit(self) -> bool:
        """Train to the last step, or until a signal asks to stop; then the state is saved.

        Returns:
            Whether the last step is done.

        Raises:
            FloatingPointError: a loss or gradient is not finite; the parameters are still those of the step before.
            OSError: a checkpoint cannot be written.
        """
        settings, state = self.settings, self.state
        started, first = time.monotonic(), state.step
        log.info("mixture asked for: %s", _listed(self.asked_shares))
        # A signal must not end this process while it closes W&B, either.
        with self._preemption, closing(self.metrics), self._watch, _progress() as progress:
            task = progress.add_task("training", total=settings.steps, completed=first, text="")
            while state.step < settings.steps and not self._is_stopping:
                number = self._first_sample(state.step, 0)
                self._watch.start(f"loading the samples of step {state.step + 1}, those from number {number} on")
                began = time.monotonic()
                values = self.train_step(state.step)
                if not values:
                    self._give_up()
                    break
                self._durations.append(time.monotonic() - began)
                values["seconds"] = (time.monotonic() - started) / (state.step - first)
                text = f"loss {values.get('total', math.nan):.3f}  {values['seconds']:.2f} s/step"
                progress.update(task, advance=1, text=text)
                is_last, state.score = state.step == settings.steps, None
                if is_last or state.step == 1 or state.step % settings.log_every == 0:
                    self._log(values)
                if self.evaluate and (is_last or (settings.eval_every and state.step % settings.eval_every == 0)):
                    self._evaluate(self.evaluate)
                if is_last or self._is_stopping or self._is_saving or state.step % settings.save_every == 0:
                    self._save()
        return state.step == settings.steps

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step (counted from 0): what is logged of it. Afterwards ``state`` stands behind it.

        Where a signal came while a rank waited for its samples, nothing is done, and nothing to be logged.
        """
        entries = list(self.objective.queue.entries) if self.objective.queue else []
        micro = self._load(step)
        counts = {**self.objective.counts(micro), "given_up": float(len(micro) < self.accumulation)}
        denominators = distributed.sum_over_ranks(counts, self.engine.device)
        if denominators.pop("given_up"):
            self._is_stopping = True
            return {}
        learning_rate = self.engine.start_step(step)
        terms = [self._micro_step(step, turn, batch, denominators) for turn, batch in enumerate(micro)]
        local = {name: float(torch.stack([term[name] for term in terms]).sum()) for name in terms[0]}
        drawn = drawn_samples(micro, list(self.asked_shares))
        wishes = {"stop": bool(self._preemption.name), "save": self._is_time_to_save()}
        total = distributed.sum_over_ranks({**local, **drawn, **wishes}, self.engine.device)
        self._is_stopping, self._is_saving = total.pop("stop") > 0, total.pop("save") > 0
        state = self.state
        state.step = step + 1
        state.drawn = {name: state.drawn.get(name, 0.0) + total.pop(name) for name in drawn}
        if self.engine.is_discarded:
            self._skip(micro, terms)
            if self.objective.queue:
                self.objective.queue.restore(entries)
            return {"skipped": state.skipped, "learning_rate": learning_rate, **self._mixture()}
        state.skipped_in_row = 0
        ratio = self._compare_with_median(micro, total["total"])
        measured = {"learning_rate": learning_rate, "grad_norm": self.engine.grad_norm, "loss_over_median": ratio}
        return {**total, **measured, "skipped": state.skipped, **self._mixture()}

    def _load(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; fewer where a signal came while they were waited for."""
        micro: list[Batch] = []
        while len(micro) < self.accumulation:
            batch = self.batches.take(lambda: time.monotonic() - self._preemption.came_at > LOADER_PATIENCE_SECONDS)
            if batch is None:
                break
            micro.append(batch)
        self._watch.doing = f"training step {step + 1} on {_names(micro)}"
        return micro

    def _micro_step(
        self, step: int, turn: int, batch: Batch, denominators: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of a micro-batch: its terms, on the device."""
        key = (self.settings.seed, DROPOUT_STREAM, step, turn, distributed.rank())
        torch.manual_seed(int(distributed.generator(*key).integers(2**62)))
        batch = batch.to(self.engine.device)
        rng = distributed.generator(self.settings.seed, DRAW_STREAM, step, turn, distributed.rank())
        losses = self.objective(self.engine(batch), batch, denominators, rng, self._first_sample(step, turn))
        self.engine.backward(losses["total"])
        self.engine.step()
        return {name: value.detach() for name, value in losses.items()}

    def _first_sample(self, step: int, turn: int) -> int:
        per_pass, turns = self.settings.micro_batch_size, turn * distributed.world_size() + distributed.rank()
        return step * self.settings.global_batch_size + turns * per_pass

    def _skip(self, micro: list[Batch], terms: list[dict[str, torch.Tensor]]) -> None:
        """Count a step whose gradients were dropped, or stop; all ranks do the same."""
        causes = [cause for rank in distributed.gather(self._causes(micro, terms)) for cause in rank]
        message = "; ".join(causes[:MAX_CAUSES]) or (
            f"the gradient summed over all ranks is not finite at step {self.state.step}, though each rank's own is"
        )
        self.state.skipped += 1
        self.state.skipped_in_row += 1
        advice = "Lower trainer.learning_rate, or look at these samples."
        if self.settings.on_nonfinite is OnNonfinite.stop:
            raise FloatingPointError(f"{message}. {advice} (trainer.on_nonfinite=skip leaves such steps out.)")
        if self.state.skipped_in_row > self.settings.max_skips_in_row:
            raise FloatingPointError(f"{message}. More than trainer.max_skips_in_row steps in a row. {advice}")
        log.warning("%s. The step is skipped, the %d. of this run", message, self.state.skipped)

    def _causes(self, micro: list[Batch], terms: list[dict[str, torch.Tensor]]) -> list[str]:
        """What was not finite on this rank: a term, or else a gradient, with the samples."""
        causes = []
        for batch, losses, gradients in zip(micro, terms, self.engine.broken_gradients(), strict=True):
            where = f"at step {self.state.step} on rank {distributed.rank()}; samples: {_names([batch])}"
            broken = {name: float(value) for name, value in losses.items() if not math.isfinite(value)}
            broken.pop("total", None)
            causes += [f"loss term {name!r} is {value} {where}" for name, value in broken.items()]
            if gradients and not broken:
                causes.append(f"the gradient of {gradients[0]} and {len(gradients) - 1} others is not finite {where}")
        return causes

    def _compare_with_median(self, micro: list[Batch], loss: float) -> float:
        """The loss over the median of the steps before; a spike is reported with this rank's samples."""
        ratio = spike(self.state.losses, loss)
        self.state.losses = [*self.state.losses, loss][-SPIKE_WINDOW:]
        if ratio > self.settings.spike_ratio:
            log.warning("loss spike at step %d: %.3g x the median; %s", self.state.step, ratio, _names(micro))
        return ratio

    def _mixture(self) -> dict[str, float]:
        return {f"mixture/{name}": share for name, share in shares(self.state.drawn).items()}

    def _is_time_to_save(self) -> bool:
        """By rank 0's clock alone: those of other ranks may differ."""
        minutes = self.settings.save_every_minutes
        return bool(minutes) and distributed.rank() == 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _log(self, values: dict[str, float]) -> None:
        step, videos = self.state.step, self.settings.global_batch_size * len(self._durations)
        cost = speed(videos, sum(self._durations), self.peak)
        self._durations.clear()
        self.metrics.write(step, {**values, **cost, "peak_memory_gib": distributed.peak_memory_gib()})
        log.info("%s", step_line(step, self.settings.steps, values))

    def _give_up(self) -> None:
        """Save the steps that were done before the samples that did not come, unless that was done."""
        log.warning("the samples of step %d did not come; it is given up", self.state.step + 1)
        if self.state.step > self._saved_step:
            self._save()

    def _save(self) -> None:
        step, steps = self.state.step, self.settings.steps
        self._watch.start(f"saving after step {step}")
        log.info("step %d/%d  saved %s", step, steps, self.checkpoints.save(self.state))
        self._saved_at, self._saved_step = time.monotonic(), step
        if self._is_stopping and step < steps:
            signal = self._preemption.name or "a signal to another process"
            log.warning("stopped by %s after step %d, saved; the same command goes on", signal, step)

    def _evaluate(self, evaluate: Callable[[], dict[str, float]]) -> None:
        step, best = self.state.step, self.settings.keep_best
        self._watch.start(f"evaluating after step {step}")
        scores = evaluate()
        self.metrics.write(step, {f"valid/{name}": value for name, value in scores.items()})
        parts = "  ".join(f"valid/{name} {value:.2f}" for name, value in scores.items())
        log.info("step %d/%d  %s", step, self.settings.steps, parts)
        if best:
            self.state.score = scores[best]
            if self.state.best is None or scores[best] > self.state.best:
                self.state.best, self._is_saving = scores[best], True


def _progress() -> Progress:
    """A bar on rank 0's terminal, if it has one."""
    done = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[text]}")
    times = (TimeElapsedColumn(), "left", TimeRemainingColumn())
    is_shown = distributed.rank() == 0 and console().is_terminal
    return Progress(*done, *times, console=console(), disable=not is_shown)


def _names(batches: Sequence[Batch]) -> str:
    return ", ".join(name for batch in batches for name in batch.names)


def _listed(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
