"""Rows pass and fail as they should, whatever the numbers are."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tools.parity import gates
from tools.parity.gates import Gate, Measure
from tools.parity.report import Report, Row, Status, print_table, write_json

ABSOLUTE, RELATIVE = Gate(0.1, Measure.absolute), Gate(0.1, Measure.relative)
README = Path(__file__).parent / "recorded" / "README.md"


def row(report: Report) -> Row:
    """The only one."""
    (found,) = report.rows
    return found


@pytest.fixture
def report() -> Report:
    return Report(Path("folder"))


@pytest.mark.parametrize(
    ("ours", "gate", "status"),
    [
        ([10.0, 0.0], RELATIVE, Status.passed),
        ([10.9, 0.9], RELATIVE, Status.passed),
        ([10.0, 1.1], RELATIVE, Status.failed),
        ([10.05, 0.05], ABSOLUTE, Status.passed),
        ([10.2, 0.0], ABSOLUTE, Status.failed),
        ([np.nan, 0.0], RELATIVE, Status.failed),
        ([np.inf, 0.0], ABSOLUTE, Status.failed),
        ([10.0], RELATIVE, Status.error),
    ],
)
def test_close(report, ours, gate, status):
    report.case("a").close("q", ours, [10.0, 0.0], gate)
    assert row(report).status is status


@pytest.mark.parametrize("recorded", [[np.nan, 1.0], [np.inf, 1.0]])
def test_what_was_recorded_must_be_a_number(report, recorded):
    report.case("a").close("q", recorded, recorded, RELATIVE)
    assert row(report).status is Status.error


def test_differences_and_scale(report):
    scale = np.array([[1.0], [100.0]])
    report.case("a").close("q", [[1.05, 2.0], [3.0, 9.0]], [[1.0, 2.0], [3.0, 4.0]], RELATIVE, scale)
    assert row(report).absolute == 5
    assert row(report).relative == pytest.approx(0.05)
    assert row(report).compared == 4


@pytest.mark.parametrize(("ours", "status"), [(0.0, Status.passed), (1e-9, Status.failed)])
def test_a_scale_of_zero_allows_no_difference(report, ours, status):
    report.case("a").close("q", [ours], [0.0], RELATIVE)
    assert row(report).status is status


@pytest.mark.parametrize(
    ("ours", "recorded", "status"),
    [
        ([1, 2], [1, 2], Status.passed),
        (["a", "b"], ["a", "b"], Status.passed),
        ([True, False], [True, True], Status.failed),
        (["b", "a"], ["a", "b"], Status.failed),
        ([1, 2, 3], [1, 2], Status.error),
        ([], [], Status.absent),
        ([1], [], Status.error),
        ([np.nan], [np.nan], Status.failed),
    ],
)
def test_equal(report, ours, recorded, status):
    report.case("a").equal("q", ours, recorded)
    assert row(report).status is status


def test_equal_tells_where_and_how_many(report):
    report.case("a").equal("q", [[1, 5], [7, 4]], [[1, 2], [3, 4]])
    assert (row(report).absolute, row(report).relative) == (2, 0.5)
    assert row(report).note == "first at (0, 1): replay 5, recorded 2"


def test_nothing_left_to_compare_is_an_error(report):
    report.case("a").differing("q", 0, 0)
    assert row(report).status is Status.error


def test_errors_become_rows(report):
    with report.case("a").errors_as_row("q"):
        raise FileNotFoundError("no file x")
    assert row(report).status is Status.error
    assert row(report).note == "FileNotFoundError: no file x"


@pytest.mark.parametrize(
    ("statuses", "met", "verdict"),
    [
        ([Status.passed], True, "met"),
        ([Status.passed, Status.absent], True, "met"),
        ([Status.passed, Status.failed], False, "NOT MET"),
        ([Status.passed, Status.error], False, "NOT MET"),
        ([Status.absent], False, "nothing was compared"),
        ([], False, "nothing was compared"),
    ],
)
def test_verdict(report, statuses, met, verdict):
    report.rows += [Row("a", "q", status) for status in statuses]
    assert report.is_met is met
    assert f": {verdict} (" in report.summary


def test_table_and_json_say_the_same(report, tmp_path):
    case = report.case("[case]")
    case.close("values", [1.0, np.inf], [1.0, 2.0], ABSOLUTE, note="why")
    case.equal("names", ["a"], ["a"])
    case.absent("other", "not there")
    text = io.StringIO()
    print_table(report, Console(file=text, width=150))
    write_json(report, tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["met"] is False
    assert content["counts"] == {"pass": 1, "fail": 1, "error": 0, "absent": 1}
    first, second, third = content["rows"]
    assert first == {
        "case": "[case]",
        "quantity": "values",
        "status": "fail",
        "absolute": "inf",
        "relative": "inf",
        "tolerance": 0.1,
        "measure": "absolute",
        "compared": 2,
        "note": "why",
    }
    assert (second["tolerance"], second["measure"], second["absolute"]) == (0, "equal", 0)
    assert (third["status"], third["tolerance"], third["absolute"]) == ("absent", None, None)
    for words in (
        ["[case]", "values", "inf", "1e-01 abs", "FAIL", "why"],
        ["names", "==", "pass"],
        ["other", "absent"],
    ):
        assert re.search(".*".join(map(re.escape, words)), text.getvalue())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_gates_are_those_of_the_recordings():
    """The last column of the table that came with the numbers."""
    table = {}
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            table[cells[0]] = [float(number) for number in re.findall(r"\b\d+e-\d+\b", cells[2])]
    expected = {
        "[SEG] embeddings": [gates.SEG_EMBEDDING],
        "low-resolution logits": [gates.MASK_LOGITS],
        "predicted IoU": [gates.PREDICTED_IOU],
        "preprocess": [gates.CLIP_INPUT, gates.SAM2_INPUT],
        "stability": [gates.STABILITY],
        "losses": [gates.LOSS],
        "gradient norm": [gates.GRADIENT_TOTAL, gates.GRADIENT_GROUP, gates.GRADIENT_TENSOR, gates.GRADIENT_NOISE],
        "full gradients": [gates.GRADIENT_VALUES],
    }
    for start, constants in expected.items():
        (limits,) = [limits for name, limits in table.items() if name.startswith(start)]
        assert limits == [gate.limit for gate in constants], start
    assert gates.PROBE == gates.PREDICTED_IOU
    measures = {name: gate.measure for name, gate in vars(gates).items() if isinstance(gate, Gate)}
    absolute = {name for name, measure in measures.items() if measure is Measure.absolute}
    assert absolute == {"CLIP_INPUT", "SAM2_INPUT", "STABILITY"}
