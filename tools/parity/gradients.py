"""Gradients of a training step, tensor by tensor, under the names that the recording gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from glus.models.glus import Glus
from glus.models.release_layout import GLUS
from tools.parity import gates
from tools.parity.fixture import Arrays, Record
from tools.parity.report import Case

Gradients = Mapping[str, torch.Tensor | None]
"""Recorded name of every trained tensor -> its gradient; None: it has none."""


def collect_gradients(glus: Glus) -> Gradients:
    """Gradients of the trained tensors; they are the model's own, so a next backward pass would add to them."""
    return {GLUS.label(name): parameter.grad for name, parameter in glus.named_parameters() if parameter.requires_grad}


def compare_gradients(case: Case, ours: Gradients, step: Record, full: Arrays | None) -> None:
    """Rows for norms in total, by group and by tensor, for the tensors without gradient, and for full gradients.

    Args:
        case: gets the rows.
        ours: of the replay.
        step: ``step*.json``.
        full: ``step*_gradients.npz``, None where there is none.
    """
    norms = {name: float(value.double().norm()) for name, value in ours.items() if value is not None}
    without = set(ours) - set(norms)
    recorded_without = step.optional("trainable_without_gradient", list)
    recorded = step.optional("gradient_norm", dict)
    if recorded_without is None:
        case.absent("tensors without gradient", f"{step.where} has no trainable_without_gradient")
    else:
        _compare_names(case, "tensors without gradient", without, set(recorded_without), len(ours))
    with case.errors_as_row("gradient norms"):
        total = math.hypot(*norms.values())
        case.close("gradient norm, total", [total], [step.get("gradient_norm_total", float)], gates.GRADIENT_TOTAL)
        for group, value in step.get("gradient_norm_by_group", dict).items():
            norm = math.hypot(*(norms[name] for name in norms if group in name))
            case.close(f"gradient norm, {group}", [norm], [value], gates.GRADIENT_GROUP)
    if recorded is None:
        case.absent("tensors with gradient", f"{step.where} has no gradient_norm")
    else:
        _compare_names(case, "tensors with gradient", set(norms), set(recorded), len(ours))
        _compare_norms(case, norms, recorded, step.get("gradient_norm_total", float))
    if full is None:
        case.absent("full gradients", "no file of gradients")
    else:
        with case.errors_as_row("full gradients"):
            _compare_values(case, ours, full)


def _compare_names(case: Case, title: str, ours: set[str], recorded: set[str], compared: int) -> None:
    wrong = sorted(ours ^ recorded)
    note = "; ".join(f"{name} {'of the replay' if name in ours else 'recorded'} alone" for name in wrong[:3])
    case.differing(title, len(wrong), compared, note)


def _compare_norms(case: Case, ours: Mapping[str, float], recorded: Mapping[str, float], total: float) -> None:
    """Each tensor's norm relative to itself, or to the total where it is negligible."""
    shared = ours.keys() & recorded.keys()
    large = sorted(name for name in shared if recorded[name] > gates.GRADIENT_NEGLIGIBLE * total)
    small = sorted(shared - set(large))
    for title, names, gate in (
        ("gradient norm, worst tensor", large, gates.GRADIENT_TENSOR),
        ("gradient norm, worst negligible tensor (of the total)", small, gates.GRADIENT_NOISE),
    ):
        want = np.array([recorded[name] for name in names])
        got = np.array([ours[name] for name in names])
        note = names[int(np.argmax(np.abs(got - want)))] if names else ""
        case.close(title, got, want, gate, want if names is large else total, note)


def _compare_values(case: Case, ours: Gradients, full: Arrays) -> None:
    """Every value of the recorded tensors, relative to the largest of its tensor."""
    got, want, scale = [], [], []
    for name in full.names:
        value = ours.get(name)
        if value is None:
            raise ValueError(f"{full.path.name}: the replay has no gradient of {name}")
        recorded = full[name]
        if recorded.shape != tuple(value.shape):
            raise ValueError(f"{full.path.name}: {name} is {recorded.shape}, in the replay {tuple(value.shape)}")
        got.append(value.numpy().ravel())
        want.append(recorded.ravel())
        scale.append(np.full(recorded.size, np.abs(recorded).max()))
    ours_all, recorded_all = np.concatenate(got), np.concatenate(want)
    note = f"{len(full.names)} tensors, each relative to its largest value"
    case.close("full gradients", ours_all, recorded_all, gates.GRADIENT_VALUES, np.concatenate(scale), note)
