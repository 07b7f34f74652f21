"""The tables of an ablation, from scores that are made up."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from glus.config import AblationClaim, AblationConfig, AblationRow
from glus.evaluation.ablation import AblationTables, ablation_section
from glus.evaluation.baselines import Comparison
from glus.evaluation.runs import bootstrap
from glus.types import Expression

VIDEOS, FRAMES = 12, ("0", "1")
KINDS = ("easy", "hard")


def comparison(easy: float, hard: float, noise: float = 0.0, chosen: tuple[bool, bool] = (True, False)) -> Comparison:
    """One model's answers: a video has one sentence of each kind; ``noise`` alternates in sign over videos."""
    expressions, scores = [], []
    for video in range(VIDEOS):
        for number, (kind, value) in enumerate(zip(KINDS, (easy, hard), strict=True)):
            expressions.append(Expression("d", f"v{video}", str(number), kind, FRAMES, (), (), kind))
            row = {"model": value + noise * (-1) ** video, "oracle": 0.9}
            scores.append(row if kind == "easy" else {**row, "random_look_alike": 0.5, "ceiling": 0.75})
    marks = [np.array(chosen) if e.group == "hard" else None for e in expressions]
    decided = [None if mark is None else np.array([True, False]) for mark in marks]
    return Comparison(tuple(expressions), tuple(scores), tuple(marks), tuple(decided))


@pytest.fixture
def tables() -> AblationTables:
    """Two seeds; b is better on hard by 0.3 and 0.1, c is b but for noise."""
    claims = [
        AblationClaim("a", "b", "hard"),
        AblationClaim("b", "c", "hard"),
        AblationClaim("b", "c", "mean", is_expected=False),
    ]
    rows = {"a": AblationRow(), "b": AblationRow(against="a"), "c": AblationRow(of="b", against="b")}
    results = {
        "a": [comparison(0.8, 0.4), comparison(0.8, 0.6)],
        "b": [comparison(0.8, 0.7), comparison(0.8, 0.7, chosen=(True, True))],
        "c": [comparison(0.8, 0.7, 0.2), comparison(0.8, 0.7, -0.2)],
    }
    return AblationTables(AblationConfig(rows=rows, claims=claims), results)


def test_cells_are_means_over_seeds_with_what_stands_beside(tables: AblationTables) -> None:
    summary = tables.summary
    assert list(summary) == ["a", "b", "c"]
    assert list(summary["a"]) == ["easy", "hard", "mean"]
    hard = summary["a"]["hard"]
    assert hard["mean"] == pytest.approx(50)
    assert hard["sd"] == pytest.approx(math.sqrt(200))
    assert (hard["chance"], hard["ceiling"], hard["oracle"]) == (50, 75, 90)
    assert (hard["chosen_decided"], hard["chosen_undecided"]) == (100, 0)
    assert summary["b"]["hard"]["chosen_undecided"] == 50
    assert summary["a"]["easy"]["chosen_decided"] is summary["a"]["mean"]["chosen_undecided"] is None
    assert hard["difference"] is hard["low"] is hard["high"] is None
    assert summary["a"]["easy"]["chance"] is None
    assert summary["a"]["mean"]["mean"] == pytest.approx(65)
    assert summary["b"]["hard"]["difference"] == pytest.approx(20)
    # Videos are alike, so the interval is that of seeds: both draws of one in a quarter of the cases each.
    assert (summary["b"]["hard"]["low"], summary["b"]["hard"]["high"]) == (pytest.approx(10), pytest.approx(30))
    assert summary["b"]["mean"]["difference"] == pytest.approx(10)


def test_a_claim_passes_where_its_interval_lies_above_zero(tables: AblationTables) -> None:
    found = tables.claims()
    assert [claim["has_passed"] for claim in found] == [True, False, None]
    assert found[1]["low"] < 0 < found[1]["high"]
    assert found[1]["detectable"] == pytest.approx(2.8 / 3.92 * (found[1]["high"] - found[1]["low"]))
    assert tables.verdicts[0].text().startswith("passed: a -> b on hard: +20.0 [+10.0, +30.0]")
    assert tables.verdicts[1].text().startswith("FAILED")
    assert tables.verdicts[2].text().startswith("reported")


def test_all_cells_follow_from_the_scores(tables: AblationTables) -> None:
    scores = tables.scores()
    kinds = [kind for _, _, kind in scores["sentences"]]
    assert scores["sentences"][:2] == [["v0", "0", "easy"], ["v0", "1", "hard"]]
    for row, seeds in scores["rows"].items():
        of_kind = [[value for value, kind in zip(seed, kinds, strict=True) if kind == "hard"] for seed in seeds]
        assert np.mean(of_kind) == pytest.approx(tables.summary[row]["hard"]["mean"])


def test_curves_and_page(tables: AblationTables) -> None:
    assert tables.curves() == {"hard": {"a": [1.0, 0.0], "b": [1.0, 0.5], "c": [1.0, 0.0]}}
    page = ablation_section(tables)
    small = re.findall(r'<small class="soft">(.*?)</small>', page)
    assert small[:3] == ["- / - / 90", "50 / 75 / 90", "100 / 0"]
    assert "a -&gt; b" in page
    assert "FAILED: b -&gt; c" in page
    assert page.count("<svg") == 1


def test_one_seed_has_no_deviation() -> None:
    config = AblationConfig(rows={"a": AblationRow()})
    tables = AblationTables(config, {"a": [comparison(0.8, 0.4)]})
    assert tables.summary["a"]["hard"]["sd"] is None
    assert tables.printed()["a"]["hard"] == "40.0"
    assert tables.differences() == {}


def test_limits_of_a_single_video_are_null_in_json() -> None:
    """They are infinite, which JSON does not know."""
    config = AblationConfig(rows={"a": AblationRow(), "b": AblationRow(against="a")})
    config.claims = [AblationClaim("a", "b", "hard")]
    of_all = [comparison(0.8, 0.4), comparison(0.8, 0.7)]
    of_one = [Comparison(c.expressions[:2], c.scores[:2], c.chosen[:2], c.decided[:2]) for c in of_all]
    tables = AblationTables(config, {row: [answers] for row, answers in zip("ab", of_one, strict=True)})
    cell, (claim,) = tables.summary["b"]["hard"], tables.claims()
    assert (cell["difference"], cell["low"], cell["high"]) == (pytest.approx(30), None, None)
    assert (claim["has_passed"], claim["low"], claim["high"], claim["detectable"]) == (False, None, None, None)
    assert tables.verdicts[0].text() == "FAILED: a -> b on hard: +30.0 [-inf, +inf], detectable inf"


def test_a_claim_about_no_kind_is_refused() -> None:
    config = AblationConfig(rows={"a": AblationRow()}, claims=[AblationClaim("a", "a", "hrad")])
    with pytest.raises(ValueError, match=r"no sentence of kind 'hrad', only easy, hard, mean"):
        AblationTables(config, {"a": [comparison(0.8, 0.4)]})


@pytest.mark.parametrize(
    ("rows", "claims", "message"),
    [
        ({"a": AblationRow(against="b"), "b": AblationRow()}, [], r"rows\.a: no row 'b' before it"),
        ({"a": AblationRow(), "b": AblationRow(of="a", train=["x=1"])}, [], r"rows\.b: has models of a, so x=1"),
        ({"a": AblationRow(), "b": AblationRow(of="a", pretrain=["y=1"])}, [], r"models of a, so y=1 changes"),
        (
            {"a": AblationRow(), "b": AblationRow(of="a"), "c": AblationRow(of="b")},
            [],
            r"rows\.c: b has none of its own but the models of a: of=a",
        ),
        ({"a": AblationRow()}, [AblationClaim("a", "z", "hard")], r"claims: no row 'z', only a"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    rows: dict[str, AblationRow], claims: list[AblationClaim], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AblationConfig(rows=rows, claims=claims)


def test_the_bootstrap_draws_videos_and_seeds() -> None:
    """Its standard error is that of independent effects of videos and of seeds."""
    rng = np.random.default_rng(0)
    of_video, of_seed = rng.normal(0, 10, 40), rng.normal(0, 4, 20)
    changes_SN = of_seed[:, None] + of_video
    found = bootstrap(changes_SN, [f"v{number}" for number in range(40)], ["k"] * 40)
    error = math.sqrt(of_video.var() / 40 + of_seed.var() / 20)
    assert found.mean == pytest.approx(changes_SN.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    kinds = ["k", "l"] * 20
    apart = bootstrap(np.where(np.array(kinds) == "k", 1.0, 3.0)[None], [str(n) for n in range(40)], kinds)
    assert (apart.mean, apart.low, apart.high) == (2, 2, 2)
