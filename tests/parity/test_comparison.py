"""Rows pass and fail as they should, whatever the numbers are."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tools.parity import comparison as gates
from tools.parity.comparison import Case, Gate, Row, is_met, print_table, thin_out, write_rows

ABSOLUTE, RELATIVE = Gate(0.1, "absolute"), Gate(0.1)
FOLDER = "folder"
README = Path(__file__).parent / "recorded" / "README.md"


def row(case: Case) -> Row:
    """The only one."""
    (found,) = case.rows
    return found


@pytest.fixture
def case() -> Case:
    return Case([], "[case]")


@pytest.mark.parametrize(
    ("ours", "gate", "status"),
    [
        ([10.0, 0.0], RELATIVE, "pass"),
        ([10.9, 0.9], RELATIVE, "pass"),
        ([10.0, 1.1], RELATIVE, "fail"),
        ([10.05, 0.05], ABSOLUTE, "pass"),
        ([10.2, 0.0], ABSOLUTE, "fail"),
        ([np.nan, 0.0], RELATIVE, "fail"),
        ([np.inf, 0.0], ABSOLUTE, "fail"),
        ([10.0], RELATIVE, "error"),
    ],
)
def test_close(case, ours, gate, status):
    case.compare("q", ours, [10.0, 0.0], gate)
    assert row(case).status == status


@pytest.mark.parametrize("recorded", [[np.nan, 1.0], [np.inf, 1.0]])
def test_what_was_recorded_must_be_a_number(case, recorded):
    case.compare("q", recorded, recorded, RELATIVE)
    assert row(case).status == "error"


def test_differences_and_scale(case):
    scale = np.array([[1.0], [100.0]])
    case.compare("q", [[1.05, 2.0], [3.0, 9.0]], [[1.0, 2.0], [3.0, 4.0]], RELATIVE, scale)
    assert row(case).absolute == 5
    assert row(case).relative == pytest.approx(0.05)
    assert row(case).compared == 4


@pytest.mark.parametrize(
    ("ours", "floor", "status"),
    [(1.05, 0.0, "pass"), (1.2, 0.0, "fail"), (1.2, 10.0, "pass"), (np.nan, 10.0, "fail"), ([1.0, 1.0], 0.0, "error")],
)
def test_arrays_are_compared_each_by_its_largest_value(case, ours, floor, status):
    with case.row("q") as compared:
        pairs = [(np.array([101.0, 3.0]), np.array([100.0, 3.0])), (np.atleast_1d(ours), np.array([1.0]))]
        compared.compare_each(pairs, RELATIVE, "two", floor)
    assert row(case).status == status
    assert status == "error" or (row(case).compared, row(case).note) == (3, "two")


@pytest.mark.parametrize(("ours", "status"), [(0.0, "pass"), (1e-9, "fail")])
def test_a_scale_of_zero_allows_no_difference(case, ours, status):
    case.compare("q", [ours], [0.0], RELATIVE)
    assert row(case).status == status


@pytest.mark.parametrize(
    ("ours", "recorded", "status"),
    [
        ([1, 2], [1, 2], "pass"),
        (["a", "b"], ["a", "b"], "pass"),
        ([True, False], [True, True], "fail"),
        (["b", "a"], ["a", "b"], "fail"),
        ([1, 2, 3], [1, 2], "error"),
        ([], [], "absent"),
        ([1], [], "error"),
        ([np.nan], [np.nan], "fail"),
    ],
)
def test_equal(case, ours, recorded, status):
    case.compare("q", ours, recorded)
    assert row(case).status == status


def test_equal_tells_where_and_how_many(case):
    case.compare("q", [[1, 5], [7, 4]], [[1, 2], [3, 4]])
    assert (row(case).absolute, row(case).relative) == (2, 0.5)
    assert row(case).note == "first at (0, 1): replay 5, recorded 2"


def test_nothing_left_to_compare_is_an_error(case):
    with case.row("q") as row_of_none:
        row_of_none.count(0, 0)
    assert row(case).status == "error"


def test_errors_become_rows(case):
    with case.row("q"):
        raise FileNotFoundError("no file x")
    assert row(case).status == "error"
    assert row(case).note == "FileNotFoundError: no file x"


@pytest.mark.parametrize(
    ("statuses", "met", "verdict"),
    [
        (["pass"], True, "met"),
        (["pass", "absent"], True, "met"),
        (["pass", "fail"], False, "NOT MET"),
        (["pass", "error"], False, "NOT MET"),
        (["absent"], False, "nothing was compared"),
        ([], False, "nothing was compared"),
    ],
)
def test_verdict(statuses, met, verdict):
    rows, text = [Row("a", "q", status) for status in statuses], io.StringIO()
    print_table(rows, FOLDER, Console(file=text, width=150))
    assert is_met(rows) is met
    assert f"folder: {verdict} (" in text.getvalue()


def test_table_and_json_say_the_same(case, tmp_path):
    case.compare("values", [1.0, np.inf], [1.0, 2.0], ABSOLUTE, note="why")
    case.compare("names", ["a"], ["a"])
    case.absent("other", "not there")
    text = io.StringIO()
    print_table(case.rows, FOLDER, Console(file=text, width=150))
    write_rows(case.rows, {"folder": FOLDER}, tmp_path / "report.json")
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
    assert measures.pop("EXACT") == "equal"
    absolute = {name for name, measure in measures.items() if measure == "absolute"}
    assert absolute == {"CLIP_INPUT", "SAM2_INPUT", "STABILITY"}


def test_maps_are_thinned_to_what_was_recorded():
    values = np.arange(64).reshape(1, 8, 8)
    assert thin_out(values, np.zeros((1, 4, 4))).tolist() == values[:, ::2, ::2].tolist()
    assert thin_out(values[0], np.zeros((8, 4))).shape == (8, 8), "no map"
    with pytest.raises(ValueError, match="side 3; expected a divisor of 8"):
        thin_out(values, np.zeros((1, 3, 3)))
