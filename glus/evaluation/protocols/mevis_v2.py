"""MeViS v2: sentences that fit nothing, and how often an answer is rightly empty or rightly not.

N-acc and T-acc are those of GRES (Liu et al., CVPR 2023) with a whole video in the place of an image, and
Final = (J&F + N-acc + T-acc) / 3, which holds for the published rows of the LSVOS 2026 challenge. Nothing public says
whether J&F is averaged over the sentences that fit nothing (where an empty answer has J = F = 1), so both are given.
"""

from __future__ import annotations

from collections.abc import Sequence

from glus.evaluation.protocols.rules import Rules
from glus.evaluation.report import ExpressionScore, ObjectScore, ScoreTable, summarize


def tables(scores: Sequence[ExpressionScore], _objects: Sequence[ObjectScore] = ()) -> list[ScoreTable]:
    """Final with J&F over all sentences, and with J&F over those that fit something."""
    overall = summarize(scores)
    rows = {}
    for name, chosen in (
        ("J&F with no-target expressions", list(scores)),
        ("J&F without no-target expressions", [score for score in scores if score.has_target]),
    ):
        mean = summarize(chosen)
        final = (mean.jf + overall.no_target_accuracy + overall.target_accuracy) / 3
        rows[name] = {
            "J": mean.j, "F": mean.f, "J&F": mean.jf,
            "N-acc": overall.no_target_accuracy, "T-acc": overall.target_accuracy,
            "Final": final, "num": len(chosen),
        }  # fmt: skip
    note = "Final = (J&F + N-acc + T-acc) / 3. Which J&F the challenge server takes is not published."
    return [ScoreTable("mevis_v2", "MeViS v2", rows, note)]


RULES = Rules("J&F: mean over all frames, then over all expressions, no-target ones included", tables=tables)
