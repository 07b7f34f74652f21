"""Training steps: forward, losses and backward as the trainer takes them, without the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from glus.batch import Batch, GlusOutput
from glus.config import ContrastiveConfig, LossConfig
from glus.files import read_json
from glus.losses.objective import GlusObjective, build_objective
from glus.models.pretrained import LoadedModel
from tools.parity import gates
from tools.parity.arrays import map_range, subsample
from tools.parity.batch import Video, compare_batch, make_batch, read_videos
from tools.parity.contrastive import (
    RecordedDraws,
    compare_candidates,
    compare_queue,
    contrastive_config,
    fill_queue,
)
from tools.parity.detach import replay_detach
from tools.parity.fixture import Arrays, Fixture, Record
from tools.parity.gradients import collect_gradients, compare_gradients
from tools.parity.models import Models
from tools.parity.observe import observed
from tools.parity.report import Case, Report

log = logging.getLogger(__name__)

LOSSES = {
    "ce_loss": ("seg",),
    "mask_bce_loss": ("bce",),
    "mask_dice_loss": ("dice",),
    "mask_loss": ("bce", "dice"),
    "contrastive_loss": ("contrastive",),
    "loss": ("total",),
}
"""Recorded name -> our terms that it is the sum of, all weighted."""
_QUEUE_KEY = "queue_before"
"""Only steps with the contrastive loss record it."""
_COMPANIONS = ("_gradients", "_queue")
"""What ``step*.npz`` may end in."""


@dataclass(frozen=True)
class Setup:
    """A model in training mode and the micro-batch."""

    folder: Path
    model: LoadedModel
    videos: list[Video]
    batch: Batch


def replay_training(report: Report, fixture: Fixture, models: Models) -> None:
    """The micro-batch, each recorded step on it, and a step with memories that carry gradients.

    Args:
        report: gets the rows.
        fixture: what to replay.
        models: the recorded model.
    """
    folder, case = fixture.folder / "training", report.case("training batch")
    if not folder.is_dir():
        report.case("training").absent("all steps", "the folder has no training/")
        return
    with case.errors_as_row("batch"):
        steps = sorted(path.stem for path in folder.glob("step*.json"))
        _report_orphans(report, folder, steps)
        model, videos = models.trainable(folder / "lora.pt", detach=True), read_videos(folder)
        setup = Setup(folder, model, videos, make_batch(folder, videos, model))
        compare_batch(case, videos, setup.batch, Arrays(folder / "batch.npz"), model)
        for name in steps:
            log.info("training: %s", name)
            with report.case(f"training {name}").errors_as_row("step"):
                replay_step(report.case(f"training {name}"), setup, name)
        log.info("training: detach")
        with report.case("training, detach: false").errors_as_row("step"):
            through = models.trainable(folder / "lora.pt", detach=False)
            objective = make_objective(None, model.vocabulary.seg_id)
            replay_detach(report, model.glus, through.glus, setup.batch, objective)


def _report_orphans(report: Report, folder: Path, steps: Sequence[str]) -> None:
    """A row for no step at all, and for arrays of a step that has no JSON."""
    if not steps:
        report.case("training").absent("all steps", "no step*.json in training/")
    for path in sorted(folder.glob("step*.npz")):
        stem = path.stem
        for ending in _COMPANIONS:
            stem = stem.removesuffix(ending)
        if stem not in steps:
            report.case(f"training {path.stem}").error("step", f"there is no {stem}.json beside it")


def make_objective(step: Record | None, seg_id: int) -> GlusObjective:
    """The released weights; the contrastive loss only if ``step`` records it."""
    weights = LossConfig().weights
    if step is None or _QUEUE_KEY not in step.values:
        return build_objective(LossConfig({**weights, "contrastive": 0.0}, ContrastiveConfig()), seg_id)
    return build_objective(LossConfig(weights, contrastive_config(step)), seg_id)


def replay_step(case: Case, setup: Setup, name: str) -> None:
    """One step: outputs, losses, gradients.

    Args:
        case: gets the rows.
        setup: model and batch.
        name: of ``<name>.json``.

    Raises:
        FileNotFoundError, ValueError: it cannot be run.
    """
    step = Record(read_json(setup.folder / f"{name}.json"), f"{name}.json")
    glus = setup.model.glus
    glus.zero_grad(set_to_none=True)
    output: GlusOutput = glus(setup.batch)
    _compare_output(case, output, _if_there(setup.folder / f"{name}.npz"))
    objective = make_objective(step, setup.model.vocabulary.seg_id)
    if objective.queue is None:
        terms = objective(output, setup.batch, objective.counts([setup.batch]), RecordedDraws([]).as_generator())
    else:
        terms = _contrastive_terms(case, objective, setup, output, step, Arrays(setup.folder / f"{name}_queue.npz"))
    _compare_losses(case, {term: value.item() for term, value in terms.items()}, step.record("losses"))
    terms["total"].backward()
    compare_gradients(case, collect_gradients(glus), step, _if_there(setup.folder / f"{name}_gradients.npz"))


def _if_there(path: Path) -> Arrays | None:
    return Arrays(path) if path.is_file() else None


def _compare_output(case: Case, output: GlusOutput, arrays: Arrays | None) -> None:
    embeds, logits = output.seg_embeds_NQC.detach().numpy(), output.mask_logits_NQmm
    for name, title in (("seg_embedding", "[SEG] embedding"), ("low_res_logits", "low-resolution logits")):
        with case.errors_as_row(title):
            if arrays is None or name not in arrays:
                case.absent(title, f"no array {name}" if arrays else "no file of outputs")
            elif name == "seg_embedding":
                case.close(title, embeds, arrays[name], gates.SEG_EMBEDDING)
            else:
                recorded = arrays[name]
                ours = subsample(logits, recorded.shape[-1])
                case.close(title, ours, recorded, gates.MASK_LOGITS, map_range(recorded))


def _contrastive_terms(
    case: Case, objective: GlusObjective, setup: Setup, output: GlusOutput, step: Record, arrays: Arrays
) -> dict[str, torch.Tensor]:
    """The losses with the recorded draws, and rows for all that belongs to the contrastive one."""
    queue = objective.queue
    assert queue is not None, "the objective was made with a queue"
    fill_queue(queue, step, arrays["before"], setup.videos)
    keys = [key for keys in setup.batch.object_keys for key in keys]
    draws = compare_candidates(case, queue, keys, output.seg_embeds_NQC.flatten(0, 1), step)
    counts = objective.counts([setup.batch])
    with observed(loss=(queue, "loss")) as calls:
        terms = objective(output, setup.batch, counts, draws.as_generator())
    (call,) = calls["loss"]
    case.equal("number of contrastive terms", [counts["contrastive"]], [len(draws.losses)])
    case.close("contrastive terms", call.result.detach().numpy(), draws.losses, gates.LOSS, np.abs(draws.losses))
    compare_queue(case, queue, step, arrays["after"])
    return terms


def _compare_losses(case: Case, terms: dict[str, float], recorded: Record) -> None:
    """Each recorded loss, relative to itself; one that is null must have no term of ours."""
    for name, value in recorded.values.items():
        title = f"loss, {name}"
        if name not in LOSSES:
            case.error(title, "recorded, but there is nothing to compare it with")
        elif value is None:
            present = [term for term in LOSSES[name] if terms.get(term, 0.0) != 0]
            case.differing(title, len(present), 1, "recorded as none")
        else:
            ours = sum(terms.get(term, 0.0) for term in LOSSES[name])
            case.close(title, [ours], [recorded.get(name, float)], gates.LOSS)
