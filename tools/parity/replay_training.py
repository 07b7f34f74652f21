"""Training steps: forward, losses and backward as the trainer takes them, without the optimizer."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from glus.batch import Batch
from glus.config import ContrastiveConfig, LossConfig
from glus.losses.objective import GlusObjective, build_objective
from glus.models.glus import Glus
from tools.parity.comparison import (
    GRADIENT_GROUP,
    GRADIENT_NEGLIGIBLE,
    GRADIENT_NOISE,
    GRADIENT_TENSOR,
    GRADIENT_TOTAL,
    GRADIENT_VALUES,
    LOSS,
    SEG_EMBEDDING,
    Case,
    NotRecorded,
    Record,
    Row,
    read_arrays,
    read_record,
)
from tools.parity.network import Fixture, collect_gradients, forward_with_memories, load_trainable, observed
from tools.parity.recorded_batch import Setup, compare_batch, fill_queue, key_name, read_setup
from tools.parity.replay_inference import FLOAT_ARRAYS, NOTHING_OF_OURS, compare_floats

LOSSES = {
    "ce_loss": ("seg",),
    "mask_bce_loss": ("bce",),
    "mask_dice_loss": ("dice",),
    "mask_loss": ("bce", "dice"),
    "contrastive_loss": ("contrastive",),
    "loss": ("total",),
}
"""Recorded name -> our terms that it is the sum of, all weighted."""
RELEASE_DATASETS, RELEASE_MIN_TERMS = ["mevis"], 2
"""What feeds the release's queue, and fewer terms than it takes (METHOD: its GLUS.py, ``cnt > 1``)."""
Gradients = Mapping[str, torch.Tensor]
"""By name in the release."""


def replay_training(rows: list[Row], fixture: Fixture) -> None:
    """The micro-batch, each recorded step on it, and a step with memories that carry gradients."""
    folder, case = fixture.folder / "training", Case(rows, "training batch")
    with case.row("batch"):
        steps = sorted(path.stem for path in folder.glob("step*.json"))
        if not steps:
            Case(rows, "training").absent("all steps", "no step*.json in training/")
        for path in sorted(folder.glob("step*.npz")):
            step = re.sub("(_queue|_gradients)$", "", path.stem)
            if step not in steps:
                Case(rows, f"training {path.stem}").error("step", f"there is no {step}.json beside it")
        setup = read_setup(folder, load_trainable(fixture, folder / "lora.pt", detach=True))
        compare_batch(case, setup)
        for name in steps:
            step_case = Case(rows, f"training {name}")
            with step_case.row("step"):
                replay_step(step_case, setup, name)
        with Case(rows, "training, detach: false").row("step"):
            replay_detach(rows, setup, load_trainable(fixture, folder / "lora.pt", detach=False).glus)


def make_objective(step: Record | None, seg_id: int) -> GlusObjective:
    """The released weights; the contrastive loss, with the recorded sizes, only if ``step`` records its queue."""
    weights = LossConfig().weights
    if step is None or "queue_before" not in step:
        return build_objective(LossConfig({**weights, "contrastive": 0.0}, ContrastiveConfig()), seg_id)
    sizes = {name: step[name] for name in ("queue_size", "temperature", "num_negatives")}
    contrastive = ContrastiveConfig(**sizes, min_terms=RELEASE_MIN_TERMS, datasets=RELEASE_DATASETS)
    return build_objective(LossConfig(weights, contrastive), seg_id)


class ReplayedStep(NamedTuple):
    """A forward and backward pass."""

    outputs: Record
    """Under their recorded names."""
    losses: dict[str, float]
    gradients: Gradients
    without: set[str]
    """Trained tensors that have no gradient."""
    reaching: dict[str, list[float]]
    """Norms of the gradients that reach the memories, see ``forward_with_memories``; 0: none does."""


def run_step(glus: Glus, batch: Batch, objective: GlusObjective, draws: Any = None) -> ReplayedStep:
    """Forward and backward, with an eye on the memories; ``draws`` stands in for the random generator."""
    glus.zero_grad(set_to_none=True)
    output, memories = forward_with_memories(glus, batch)
    terms = objective(output, batch, objective.counts([batch]), draws)
    terms["total"].backward()
    outputs = {"seg_embedding": output.seg_embeds_NQC, "low_res_logits": output.mask_logits_NQmm}
    return ReplayedStep(
        Record({name: value.detach().numpy() for name, value in outputs.items()}, "the replay"),
        {name: value.item() for name, value in terms.items()},
        *collect_gradients(glus),
        {what: [0.0 if t.grad is None else _norm(t.grad) for t in tensors] for what, tensors in memories.items()},
    )


def _norm(gradient: torch.Tensor) -> float:
    return float(gradient.double().norm())


def _norms(gradients: Gradients) -> dict[str, float]:
    return {name: _norm(gradient) for name, gradient in gradients.items()}


def replay_step(case: Case, setup: Setup, name: str) -> None:
    """The outputs, losses and gradients of ``<name>.json``.

    Raises:
        FileNotFoundError, ValueError: it cannot be run.
    """
    step, glus = read_record(setup.folder / f"{name}.json"), setup.model.glus
    objective = make_objective(step, setup.model.vocabulary.seg_id)
    if objective.queue is None:
        replayed = run_step(glus, setup.batch, objective)
    else:
        replayed = _replay_contrastive(case, setup, objective, step, read_arrays(setup.folder / f"{name}_queue.npz"))
    _compare_outputs(case, replayed.outputs, _read_if_there(setup.folder / f"{name}.npz"))
    _compare_losses(case, replayed.losses, step)
    compare_gradients(case, replayed, step, _read_if_there(setup.folder / f"{name}_gradients.npz"))


def _read_if_there(path: Path) -> Record:
    return read_arrays(path) if path.is_file() else Record({}, str(path))


def _compare_outputs(case: Case, ours: Record, recorded: Record, note: str = "") -> None:
    for name, values in ours.items():
        with case.row(FLOAT_ARRAYS[name][0]) as row:
            compare_floats(row, name, values, recorded.optional(name), note)


def _compare_losses(case: Case, terms: Mapping[str, float], step: Record) -> None:
    """Each recorded loss, relative to itself; one that is null must have no term of ours."""
    for name, recorded in step.part("losses").items():
        with case.row(f"loss, {name}") as row:
            if name not in LOSSES:
                raise ValueError(NOTHING_OF_OURS)
            ours = [terms.get(term, 0.0) for term in LOSSES[name]]
            if recorded is None:
                row.count(sum(value != 0 for value in ours), 1, "recorded as none")
            else:
                row.compare(sum(ours), recorded, LOSS)


class RecordedDraws:
    """Stands in for the random generator of ``ContrastiveQueue.loss``: gives the recorded draws, anchor by anchor.

    Args:
        draws: of the anchors that have a term, in order.
    """

    def __init__(self, draws: Sequence[Record]):
        self._left = deque(np.array(part) for draw in draws for part in (draw["positive"], draw["negatives"]))
        self.is_candidate: list[np.ndarray] = []
        """Of each draw so far, a positive and negatives in turn: whether it is one of the candidates."""
        self.num_candidates: list[int] = []

    def choice(self, candidates: np.ndarray, size: int | None = None) -> np.ndarray:
        """The next positive or, where a ``size`` is given, negatives.

        Raises:
            ValueError: none is left, or it is not of this size.
        """
        if not self._left:
            raise ValueError("other anchors have a term than recorded; their draws cannot be replayed")
        draw = self._left.popleft()
        if draw.size != (size or 1):
            raise ValueError(f"an anchor drew {draw.size} negatives; expected num_negatives={size}")
        self.num_candidates.append(len(candidates))
        self.is_candidate.append(np.isin(draw, candidates))
        return draw


def _replay_contrastive(
    case: Case, setup: Setup, objective: GlusObjective, step: Record, arrays: Record
) -> ReplayedStep:
    """A step with the recorded draws, and rows for all that belongs to its contrastive loss.

    Raises:
        ValueError: the draws cannot be replayed.
    """
    queue = objective.queue
    assert queue is not None, "the step records a queue"
    fill_queue(queue, step, arrays["before"], setup.videos)
    keys = [key for keys in setup.batch.object_keys for key in keys]
    anchors = [Record(draw, f"{step.where}: draw {number}") for number, draw in enumerate(step["draws"])]
    recorded = [anchor for anchor in anchors if anchor["loss"] is not None]
    counts, draws = objective.counts([setup.batch]), RecordedDraws(recorded)
    with observed(loss=(queue, "loss"), candidates=(queue, "candidates")) as calls:
        replayed = run_step(setup.model.glus, setup.batch, objective, draws)
    (candidates,), (terms,) = ([call.result for call in calls[name]] for name in ("candidates", "loss"))
    case.compare("anchors", [key_name(key) for key in keys], [anchor["anchor"] for anchor in anchors])
    has_term = [anchor["loss"] is not None for anchor in anchors]
    case.compare("anchors with a term", [found is not None for found in candidates], has_term)
    num_candidates = [draw["num_positive_candidates"] for draw in recorded]
    case.compare("number of positive candidates", draws.num_candidates[::2], num_candidates)
    for start, title in enumerate(("drawn positives are candidates", "drawn negatives are candidates")):
        case.compare(title, draws.is_candidate[start::2], np.ones_like(draws.is_candidate[start::2]))
    case.compare("number of contrastive terms", counts["contrastive"], len(recorded))
    losses = [draw["loss"] for draw in recorded]
    case.compare("contrastive terms", terms.detach().numpy(), losses, LOSS, np.abs(losses))
    case.compare("queue, names in order", [key_name(entry.key) for entry in queue.entries], step["queue_after"])
    embeds = torch.stack([entry.embed for entry in queue.entries]).numpy()
    case.compare("queue, embeddings", embeds, arrays["after"], SEG_EMBEDDING)
    return replayed


def compare_gradients(case: Case, replayed: ReplayedStep, step: Record, full: Record) -> None:
    """Rows for norms in total, by group and by tensor, for the tensors without gradient, and for full gradients.

    Args:
        case: gets the rows.
        replayed: what of ours is compared.
        step: ``step*.json``.
        full: ``step*_gradients.npz``, empty where there is none.
    """
    norms, num_trained = _norms(replayed.gradients), len(replayed.gradients) + len(replayed.without)
    with case.row("tensors without gradient") as row:
        _compare_names(row, replayed.without, step.optional("trainable_without_gradient"), num_trained)
    with case.row("gradient norms"):
        case.compare("gradient norm, total", math.hypot(*norms.values()), step["gradient_norm_total"], GRADIENT_TOTAL)
        for group, value in step["gradient_norm_by_group"].items():
            norm = math.hypot(*(norms[name] for name in norms if group in name))
            case.compare(f"gradient norm, {group}", norm, value, GRADIENT_GROUP)
    with case.row("tensors with gradient") as row:
        _compare_names(row, norms, step.optional("gradient_norm"), num_trained)
        _compare_norms(case, norms, step["gradient_norm"], step["gradient_norm_total"])
    with case.row("full gradients") as row:
        _compare_values(row, replayed.gradients, full)


def _compare_names(row: Row, ours: Iterable[str], recorded: Iterable[str], compared: int) -> None:
    wrong = sorted(set(ours) ^ set(recorded))
    note = "; ".join(f"{name} {'of the replay' if name in ours else 'recorded'} alone" for name in wrong[:3])
    row.count(len(wrong), compared, note)


def _compare_norms(case: Case, ours: Mapping[str, float], recorded: Mapping[str, float], total: float) -> None:
    """Each tensor's norm relative to itself, or to the total where it is negligible."""
    shared = sorted(ours.keys() & recorded.keys())
    negligible = [name for name in shared if recorded[name] <= GRADIENT_NEGLIGIBLE * total]
    for title, names, gate, scale in (
        ("gradient norm, worst tensor", sorted({*shared} - {*negligible}), GRADIENT_TENSOR, recorded),
        ("gradient norm, worst negligible tensor (of the total)", negligible, GRADIENT_NOISE, None),
    ):
        got, want = (np.array([norms[name] for name in names]) for norms in (ours, recorded))
        worst = names[int(np.argmax(np.abs(got - want)))] if names else ""
        case.compare(title, got, want, gate, want if scale else total, worst)


def _compare_values(row: Row, ours: Gradients, full: Record) -> None:
    """Every value of the recorded tensors, relative to the largest of its tensor."""
    if not full:
        raise NotRecorded(f"no file {full.where}")
    for name, recorded in full.items():
        if name not in ours or ours[name].shape != recorded.shape:
            raise ValueError(f"{full.where}: {name} is {recorded.shape}; the replay has no such gradient")
    pairs = ((ours[name].numpy(), recorded) for name, recorded in full.items())
    row.compare_each(pairs, GRADIENT_VALUES, f"{len(full)} tensors, each relative to its largest value")


def replay_detach(rows: list[Row], setup: Setup, through: Glus) -> None:
    """One step with and one without gradients through the memory: equal outputs, other gradients.

    Nothing is recorded of this; it is seen directly.

    Args:
        rows: get the rows.
        setup: the model built with ``detach: true``, and the micro-batch.
        through: the same model, built with ``detach: false``.
    """
    off, on = Case(rows, "training, detach: true"), Case(rows, "training, detach: false")
    objective = make_objective(None, setup.model.vocabulary.seg_id)
    detached, ours = (run_step(glus, setup.batch, objective) for glus in (setup.model.glus, through))
    if not detached.reaching["memory"]:
        on.absent("gradient through memories", "one query frame reads no memory")
        return
    for what, article in (("memory", "a"), ("memory attention", "the")):
        none, some = detached.reaching[what], ours.reaching[what]
        off.count(f"no gradient reaches {article} {what}", len(none) - none.count(0), len(none), _listed(none))
        on.count(f"a gradient reaches every {what}", some.count(0), len(some), _listed(some))
    note = "as with detach: true"
    _compare_outputs(on, ours.outputs, detached.outputs, note)
    for name, value in detached.losses.items():
        on.compare(f"loss, {name}", ours.losses[name], value, LOSS, note=note)
    _compare_gradients_differ(on, ours.gradients, detached.gradients)


def _listed(norms: Sequence[float]) -> str:
    return f"norms {', '.join(f'{norm:.1e}' for norm in norms)}"


def _compare_gradients_differ(case: Case, ours: Gradients, detached: Gradients) -> None:
    """Those of tensors that matter must not all be equal."""
    norms = _norms(detached)
    least = GRADIENT_NEGLIGIBLE * math.hypot(*norms.values())
    off = _norms({name: ours[name] - detached[name] for name, norm in norms.items() if norm > least})
    differences = {name: norm / norms[name] for name, norm in off.items()}
    most = max(differences, key=differences.__getitem__)
    unequal = sum(difference > 0 for difference in differences.values())
    note = f"{unequal} of {len(differences)} tensors differ; most, by {differences[most]:.1e} of its norm: {most}"
    case.count("gradients differ from detach: true", int(unequal == 0), 1, note)
