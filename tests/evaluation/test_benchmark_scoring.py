"""The benchmark of scoring, on masks that are too small to say anything about speed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tools.benchmark_scoring import main


def test_every_figure_is_there_and_finite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = tmp_path / "scoring.json"
    sizes = ["--sizes", "48x64", "72x128", "--headline", "72x128"]
    main([*sizes, "--frames", "2", "--seconds", "0", "--json", str(report)])
    results = json.loads(report.read_text())
    headline = ("rle_ratio", "dense_ratio", "packed_ratio", "end_to_end_ratio")
    figures = [results[name] for name in headline]
    groups = (*results["in_memory"].values(), results["end_to_end"])
    figures += [figure for group in groups for figure in group.values()]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures), results
    assert list(results["in_memory"]) == ["48x64", "72x128"]
    assert 0.6 < results["in_memory"]["72x128"]["mean_j"] < 0.95
    assert "rle_ratio" in capsys.readouterr().out


def test_the_headline_must_be_measured(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--sizes", "48x64", "--headline", "72x128"])
    assert "--headline must be one of --sizes" in capsys.readouterr().err
