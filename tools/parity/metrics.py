"""J and F of recorded masks."""

from __future__ import annotations

from glus.evaluation.packed import boundary_accuracy, region_similarity
from tools.parity.fixture import Arrays, Fixture, read_records
from tools.parity.report import Report


def replay_metrics(report: Report, fixture: Fixture) -> None:
    """J and F of every pair of masks, which must be equal to the last bit.

    Args:
        report: gets the rows.
        fixture: what to replay.
    """
    folder, case = fixture.folder / "metrics", report.case("metrics")
    if not folder.is_dir():
        case.absent("J, F", "the folder has no metrics/")
        return
    with case.errors_as_row("metrics.json"):
        entries, masks = read_records(folder / "metrics.json"), Arrays(folder / "masks.npz")
        listed = set()
        j, f = [], []
        for entry in entries:
            number = entry.get("index", int)
            names = (f"pred_{number:02d}", f"gt_{number:02d}")
            listed |= set(names)
            prediction_1HW, target_1HW = (masks[name][None] for name in names)
            j.append(float(region_similarity(prediction_1HW, target_1HW)[0]))
            f.append(float(boundary_accuracy(prediction_1HW, target_1HW)[0]))
        case.equal("J", j, [entry.get("J", float) for entry in entries])
        case.equal("F", f, [entry.get("F", float) for entry in entries])
        for name in sorted(set(masks.names) - listed):
            case.error(name, "metrics.json does not list it")
