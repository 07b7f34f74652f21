"""The tables of an ablation: means over trained models, differences with intervals, and what was claimed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glus.config import AblationClaim, AblationConfig
from glus.evaluation.baselines import UNGROUPED, Comparison
from glus.evaluation.page import svg_text
from glus.evaluation.runs import Difference, bootstrap

MEAN = "mean"
"""What stands for all kinds, each with weight 1."""
DETECTABLE = 2.8 / (2 * 1.96)
"""Of the width of a 95 % interval: a difference that 80 % of repetitions would find."""

Results = Mapping[str, Sequence[Comparison]]
"""Row -> what its models answered, one for each seed, all to the same sentences."""


@dataclass(frozen=True)
class Cell:
    """J&F in percent of one row on one kind of sentence."""

    mean: float
    sd: float | None
    """Over seeds; None for one seed."""
    difference: float | None
    """To the row that it is held against, with its interval; None where there is none."""
    low: float | None
    high: float | None
    chance: float | None
    """One of the look-alikes at random; None where not all sentences have one."""
    ceiling: float | None
    """What the frames that the row sees can decide; see ``glus/data/evidence.py``."""
    oracle: float
    """The model's own masks, were the choice always right."""


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
        claim, change = self.claim, self.difference
        return (
            f"{word}: {claim.worse} -> {claim.better} on {claim.kind}: {change.mean:+.1f} "
            f"[{change.low:+.1f}, {change.high:+.1f}], detectable {self.detectable:.1f}"
        )


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
        self.cells = {row: {kind: self._cell(row, kind) for kind in self.kinds} for row in results}
        self.verdicts = [Verdict(c, self._difference(c.worse, c.better, c.kind)) for c in config.claims]

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """``{row: {kind: {"mean", "sd", "difference", "low", "high", ...}}}``."""
        return {row: {kind: asdict(cell) for kind, cell in cells.items()} for row, cells in self.cells.items()}

    def claims(self) -> list[dict[str, Any]]:
        """One entry for each claim."""
        return [
            {**asdict(v.claim), **asdict(v.difference), "has_passed": v.has_passed, "detectable": v.detectable}
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
        """The cells for people, ``96.5 ± 0.3``, by row."""
        return {
            row: {kind: f"{c.mean:.1f}" + ("" if c.sd is None else f" ± {c.sd:.1f}") for kind, c in cells.items()}
            for row, cells in self.cells.items()
        }

    def differences(self) -> dict[str, dict[str, str]]:
        """``+30.5 [22.6, 39.0]``, for the rows that are held against another."""
        return {
            f"{self._config.rows[row].against} -> {row}": {
                kind: f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]" for kind, c in cells.items()
            }
            for row, cells in self.cells.items()
            if self._config.rows[row].against is not None
        }

    def _scores(self, row: str, name: str = "model") -> np.ndarray:
        """(S, N) in percent; NaN where a sentence does not have it."""
        return 100 * np.array([[s.get(name, np.nan) for s in of_seed.scores] for of_seed in self._results[row]])

    def _of_kind(self, scores_SN: np.ndarray, kind: str) -> np.ndarray:
        """(S,) means, over the kinds for ``MEAN``."""
        if kind == MEAN:
            return np.mean([self._of_kind(scores_SN, each) for each in self.kinds[:-1]], axis=0)
        return scores_SN[:, [each == kind for each in self._kinds]].mean(1)

    def _cell(self, row: str, kind: str) -> Cell:
        scores_S, against = self._of_kind(self._scores(row), kind), self._config.rows[row].against
        change = None if against is None else self._difference(against, row, kind)
        difference, low, high = (None, None, None) if change is None else (change.mean, change.low, change.high)
        beside = [float(self._of_kind(self._scores(row, name), kind).mean()) for name in _BESIDE]
        chance, ceiling, oracle = (None if np.isnan(value) else value for value in beside)
        assert oracle is not None, "a model answers every sentence"
        sd = float(scores_S.std(ddof=1)) if len(scores_S) > 1 else None
        return Cell(float(scores_S.mean()), sd, difference, low, high, chance, ceiling, oracle)

    def _difference(self, worse: str, better: str, kind: str) -> Difference:
        changes_SN = self._scores(better) - self._scores(worse)
        chosen = [number for number, each in enumerate(self._kinds) if kind in (each, MEAN)]
        videos, kinds = ([names[number] for number in chosen] for names in (self._videos, self._kinds))
        return bootstrap(changes_SN[:, chosen], videos, kinds)


_BESIDE = ("random_look_alike", "ceiling", "oracle")


def plot_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """SVG, a panel per kind: in which frames the right look-alike is chosen."""
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
    if curves:
        axes[0].legend(fontsize=7)
    return svg_text(figure)


def ablation_section(tables: AblationTables) -> str:
    """HTML of the tables, for the report page."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    curves = tables.curves()
    return environment.get_template("ablation.html").render(
        kinds=tables.kinds,
        rows=tables.printed(),
        cells=tables.cells,
        differences=tables.differences(),
        verdicts=tables.verdicts,
        curves=plot_curves(curves) if curves else "",
    )
