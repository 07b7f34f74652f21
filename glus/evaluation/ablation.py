"""The tables of an ablation: means over trained models, differences with intervals, and what was claimed beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glus.config import AblationClaim, AblationConfig
from glus.evaluation.baselines import UNGROUPED, Comparison
from glus.evaluation.page import TEMPLATES, svg_text
from glus.evaluation.runs import Difference, bootstrap

MEAN = "mean"
"""What stands for all kinds, each with weight 1."""
DETECTABLE = 2.8 / (2 * 1.96)
"""Of the width of a 95 % interval: a difference that 80 % of repetitions would find."""

Results = Mapping[str, Sequence[Comparison]]
"""Row -> what its models answered, one for each seed, all to the same sentences."""


@dataclass(frozen=True)
class Verdict:
    """What came of a claim."""

    claim: AblationClaim
    difference: Difference

    @property
    def has_passed(self) -> bool | None:
        """None where nothing was expected."""
        return self.difference.low > 0 if self.claim.is_expected else None

    @property
    def detectable(self) -> float:
        """The smallest difference that would have been found four times out of five."""
        return DETECTABLE * (self.difference.high - self.difference.low)

    def text(self) -> str:
        """In a line."""
        word = {True: "passed", False: "FAILED", None: "reported"}[self.has_passed]
        pair = f"{self.claim.worse} -> {self.claim.better} on {self.claim.kind}"
        return f"{word}: {pair}: {self.difference}, detectable {self.detectable:.1f}"


class AblationTables:
    """Everything that follows from the answers of an ablation's models.

    Args:
        config: its rows and claims.
        results: of each row.

    Raises:
        ValueError: a claim is about a kind that the benchmark does not have.
    """

    def __init__(self, config: AblationConfig, results: Results):
        self._config, self._results = config, results
        expressions = next(iter(results.values()))[0].expressions
        self._videos, self._kinds = [e.video for e in expressions], [e.group or UNGROUPED for e in expressions]
        self.kinds = [*dict.fromkeys(self._kinds), MEAN]
        unknown = [claim.kind for claim in config.claims if claim.kind not in self.kinds]
        if unknown:
            raise ValueError(f"ablation.claims: no sentence of kind {unknown[0]!r}, only {', '.join(self.kinds)}")
        self._changes = {
            row: {kind: self._difference(against, row, kind) for kind in self.kinds}
            for row, against in ((row, config.rows[row].against) for row in results)
            if against is not None
        }
        self.summary = {row: {kind: self._cell(row, kind) for kind in self.kinds} for row in results}
        """By row and kind, J&F in percent and what stands beside it.

        ``mean``, and ``sd`` over seeds (None for one); ``difference``, ``low`` and ``high`` to the row that it is held
        against (None where there is none); ``chance``: one of the look-alikes at random (None where not all sentences
        have one); ``ceiling``: what the frames that the row sees can decide, see ``glus/data/evidence.py``; ``oracle``:
        the model's own masks, were the choice always right; ``chosen_decided`` and ``chosen_undecided``: in how many of
        the frames that it can decide, and of the others, the right look-alike is the one that fits (None without such).
        """
        self.verdicts = [Verdict(c, self._difference(c.worse, c.better, c.kind)) for c in config.claims]

    def claims(self) -> list[dict[str, Any]]:
        """One entry for each claim."""
        return [
            _finite(asdict(v.claim) | asdict(v.difference) | {"has_passed": v.has_passed, "detectable": v.detectable})
            for v in self.verdicts
        ]

    def curves(self) -> dict[str, dict[str, list[float]]]:
        """``{kind: {row: share}}``: how often the right look-alike is the one that fits, in each frame."""
        found: dict[str, dict[str, list[float]]] = {}
        for row, seeds in self._results.items():
            of_kind: dict[str, list[np.ndarray]] = {}
            for comparison in seeds:
                for kind, chosen_T in zip(self._kinds, comparison.chosen, strict=True):
                    if chosen_T is not None:
                        of_kind.setdefault(kind, []).append(chosen_T)
            for kind, chosen in of_kind.items():
                if len({len(chosen_T) for chosen_T in chosen}) == 1:
                    found.setdefault(kind, {})[row] = np.mean(chosen, axis=0).tolist()
        return found

    def scores(self) -> dict[str, Any]:
        """J&F in percent of every sentence, from which means, differences and claims follow.

        Returns:
            ``{"sentences": [[video, expression, kind]], "rows": {row: one list for each seed}}``.
        """
        expressions = next(iter(self._results.values()))[0].expressions
        sentences = [[e.video, e.exp_id, kind] for e, kind in zip(expressions, self._kinds, strict=True)]
        return {"sentences": sentences, "rows": {row: self._scores(row).round(2).tolist() for row in self._results}}

    def printed(self) -> dict[str, dict[str, str]]:
        """The means for people, ``96.5 ± 0.3``, by row."""
        return {
            row: {k: f"{c['mean']:.1f}" + ("" if c["sd"] is None else f" ± {c['sd']:.1f}") for k, c in cells.items()}
            for row, cells in self.summary.items()
        }

    def differences(self) -> dict[str, dict[str, str]]:
        """``+30.5 [+22.6, +39.0]``, for the rows that are held against another."""
        return {
            f"{self._config.rows[row].against} -> {row}": {kind: str(change) for kind, change in changes.items()}
            for row, changes in self._changes.items()
        }

    def _scores(self, row: str, name: str = "model") -> np.ndarray:
        """(S, N) in percent; NaN where a sentence does not have it."""
        return 100 * np.array([[s.get(name, np.nan) for s in of_seed.scores] for of_seed in self._results[row]])

    def _of_kind(self, scores_SN: np.ndarray, kind: str) -> np.ndarray:
        """(S,) means, over the kinds for ``MEAN``."""
        if kind == MEAN:
            return np.mean([self._of_kind(scores_SN, each) for each in self.kinds[:-1]], axis=0)
        return scores_SN[:, [each == kind for each in self._kinds]].mean(1)

    def _cell(self, row: str, kind: str) -> dict[str, float | None]:
        scores_S, change = self._of_kind(self._scores(row), kind), self._changes.get(row, {}).get(kind)
        beside = {key: float(self._of_kind(self._scores(row, name), kind).mean()) for key, name in _BESIDE.items()}
        cell = {
            "mean": float(scores_S.mean()),
            "sd": float(scores_S.std(ddof=1)) if len(scores_S) > 1 else None,
            "difference": None if change is None else change.mean,
            "low": None if change is None else change.low,
            "high": None if change is None else change.high,
            **beside,
            **self._choices(row, kind),
        }
        return _finite(cell)

    def _choices(self, row: str, kind: str) -> dict[str, float | None]:
        """In percent of the frames of all videos and seeds."""
        frames = [np.zeros((2, 0), bool)]
        for of_seed in self._results[row]:
            for each, chosen_T, decided_T in zip(self._kinds, of_seed.chosen, of_seed.decided, strict=True):
                if each == kind and chosen_T is not None and decided_T is not None:
                    frames.append(np.stack([chosen_T, decided_T]))
        chosen_F, decided_F = np.concatenate(frames, axis=1)
        parts = {"chosen_decided": chosen_F[decided_F], "chosen_undecided": chosen_F[~decided_F]}
        return {name: 100 * float(part.mean()) if len(part) else None for name, part in parts.items()}

    def _difference(self, worse: str, better: str, kind: str) -> Difference:
        changes_SN = self._scores(better) - self._scores(worse)
        chosen = [number for number, each in enumerate(self._kinds) if kind in (each, MEAN)]
        videos, kinds = ([names[number] for number in chosen] for names in (self._videos, self._kinds))
        return bootstrap(changes_SN[:, chosen], videos, kinds)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """None in the place of NaN (not all sentences have it) and infinity (limits of one video): JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


_BESIDE = {"chance": "random_look_alike", "ceiling": "ceiling", "oracle": "oracle"}
"""Answers that stand beside a mean."""


def plot_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """SVG, a panel for each of one or more kinds: in which frames the right look-alike is chosen."""
    figure = Figure(figsize=(12, 2.6 * -(-len(curves) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(curves) // 3), min(3, len(curves)), squeeze=False).ravel()
    for axis, (kind, rows) in zip(axes, curves.items(), strict=False):
        for row, shares in rows.items():
            axis.plot(shares, label=row, linewidth=1.2)
        axis.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
        axis.set(title=kind, ylim=(0, 1.02), xlabel="frame")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(curves) :]:
        axis.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=6, loc="outside lower center")
    return svg_text(figure)


def ablation_section(tables: AblationTables) -> str:
    """HTML of the tables, for the report page."""
    curves = tables.curves()
    return TEMPLATES.get_template("ablation.html").render(
        kinds=tables.kinds,
        rows=tables.printed(),
        cells=tables.summary,
        differences=tables.differences(),
        verdicts=tables.verdicts,
        curves=plot_curves(curves) if curves else "",
    )
