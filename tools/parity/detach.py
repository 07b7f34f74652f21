"""Memories that carry gradients: equal outputs, other gradients. Nothing is recorded of this; it is seen directly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from glus.batch import Batch, GlusOutput
from glus.losses.objective import GlusObjective
from glus.models.glus import Glus
from tools.parity import gates
from tools.parity.arrays import map_range
from tools.parity.contrastive import RecordedDraws
from tools.parity.gradients import Gradients, collect_gradients
from tools.parity.observe import observed
from tools.parity.report import Case, Report


@dataclass(frozen=True)
class Run:
    """A forward and backward pass."""

    output: GlusOutput
    losses: dict[str, float]
    gradients: Gradients
    at_encoder: list[float]
    """Norm of the gradient that reaches each memory as the memory encoder made it; 0: none does."""
    at_attention: list[float]
    """Likewise at each output of the memory attention."""


def run_step(glus: Glus, batch: Batch, objective: GlusObjective) -> Run:
    """Forward and backward, with an eye on the memories."""
    glus.zero_grad(set_to_none=True)
    with observed(encoder=(glus.segmenter, "memorize"), attention=(glus.segmenter, "condition")) as calls:
        output: GlusOutput = glus(batch)
    encoded = [call.result.features_NChw for call in calls["encoder"]]
    attended = [call.result.image_NChw for call in calls["attention"] if call.arguments[1] is not None]
    for tensor in (*encoded, *attended):
        if tensor.requires_grad:
            tensor.retain_grad()
    terms = objective(output, batch, objective.counts([batch]), RecordedDraws([]).as_generator())
    terms["total"].backward()
    return Run(
        output,
        {name: value.item() for name, value in terms.items()},
        collect_gradients(glus),
        [_norm(tensor) for tensor in encoded],
        [_norm(tensor) for tensor in attended],
    )


def replay_detach(report: Report, detached: Glus, through: Glus, batch: Batch, objective: GlusObjective) -> None:
    """One step with and one without gradients through the memory.

    Args:
        report: gets the rows.
        detached: built with ``detach: true``.
        through: the same model, built with ``detach: false``.
        batch: the micro-batch.
        objective: without the contrastive loss.
    """
    off, on = report.case("training, detach: true"), report.case("training, detach: false")
    a, b = run_step(detached, batch, objective), run_step(through, batch, objective)
    if not a.at_encoder:
        on.absent("gradient through memories", "one query frame reads no memory")
        return
    _count(off, "no gradient reaches a memory", [norm > 0 for norm in a.at_encoder], a.at_encoder)
    _count(off, "no gradient reaches the memory attention", [norm > 0 for norm in a.at_attention], a.at_attention)
    _count(on, "a gradient reaches every memory", [norm == 0 for norm in b.at_encoder], b.at_encoder)
    _count(on, "a gradient reaches every memory attention", [norm == 0 for norm in b.at_attention], b.at_attention)
    _compare_outputs(on, b, a)
    _compare_gradients(on, b.gradients, a.gradients)


def _count(case: Case, title: str, is_wrong: list[bool], norms: list[float]) -> None:
    note = f"norms {', '.join(f'{norm:.1e}' for norm in norms)}"
    case.differing(title, sum(is_wrong), len(is_wrong), note)


def _compare_outputs(case: Case, ours: Run, detached: Run) -> None:
    note = "as with detach: true"
    embeds, other_embeds = (run.output.seg_embeds_NQC.detach().numpy() for run in (ours, detached))
    logits, other_logits = (run.output.mask_logits_NQmm.detach().numpy() for run in (ours, detached))
    case.close("[SEG] embedding", embeds, other_embeds, gates.SEG_EMBEDDING, note=note)
    case.close("low-resolution logits", logits, other_logits, gates.MASK_LOGITS, map_range(other_logits), note=note)
    for name, value in detached.losses.items():
        case.close(f"loss, {name}", [ours.losses[name]], [value], gates.LOSS, note=note)


def _compare_gradients(case: Case, ours: Gradients, detached: Gradients) -> None:
    """Those of tensors that matter must not all be equal."""
    norms = {name: float(value.double().norm()) for name, value in detached.items() if value is not None}
    least = gates.GRADIENT_NEGLIGIBLE * math.hypot(*norms.values())
    differences = {
        name: float((value - other).double().norm()) / norms[name]
        for name, value in ours.items()
        if (other := detached[name]) is not None and value is not None and norms[name] > least
    }
    most = max(differences, key=differences.__getitem__)
    unequal = sum(difference > 0 for difference in differences.values())
    note = f"{unequal} of {len(differences)} tensors differ; most, by {differences[most]:.1e} of its norm: {most}"
    case.differing("gradients differ from detach: true", int(unequal == 0), 1, note)


def _norm(tensor: torch.Tensor) -> float:
    return 0.0 if tensor.grad is None else float(tensor.grad.double().norm())
