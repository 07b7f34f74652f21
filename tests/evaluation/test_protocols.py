"""Every benchmark's own numbers, by hand or by a plain copy of what its script does, on files in its layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from glus.config import Layout, Missing, Protocol
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.evaluation.protocols import PROTOCOLS as PROTOCOL_CLASSES
from glus.evaluation.report import ScoreReport, print_report
from glus.evaluation.score import score_predictions
from tests.edits import edit_json
from tests.evaluation.predicted import Masks, true_masks, write_png, write_rle
from tests.layouts import SIZE, WRITERS, Written, make_video

NUM_PIXELS = SIZE[0] * SIZE[1]


@pytest.fixture
def write(tmp_path: Path):
    """Writes a split in a layout, to be scored by a protocol."""

    def write_split(layout: Layout, split: str, protocol: Protocol) -> Written:
        written = WRITERS[layout](tmp_path / layout.value, split)
        return replace(written, dataset=replace(written.dataset, protocol=protocol))

    return write_split


@pytest.fixture
def score(tmp_path: Path):
    """Writes predictions and scores them."""

    def score_masks(written: Written, masks: Masks, missing: Missing = Missing.zero) -> ScoreReport:
        return score_predictions(written.dataset, write_png(tmp_path / "predictions", written.dataset, masks), missing)

    return score_masks


def table(report: ScoreReport, name: str) -> dict[str, dict[str, float]]:
    return next(table.rows for table in report.tables if table.name == name)


def test_mevis_v2(write, score) -> None:
    written = write(Layout.mevis_v2, "valid_u", Protocol.mevis_v2)
    masks = true_masks(written)
    masks["valid_u0", "2"][3, 0, 0] = True  # "a square", which is nowhere: one pixel in one of five frames
    masks["valid_u1", "1"][:] = False  # "what comes in" after the first of five frames: no answer
    rows = table(score(written, masks), "mevis_v2")
    n_acc, t_acc, jf, jf_target = 1 / 2, 3 / 4, (1 + 1 + 0.8 + 1 + 0.2 + 1) / 6, (1 + 1 + 1 + 0.2) / 4
    for name, expected, num in (
        ("J&F with no-target expressions", jf, 6),
        ("J&F without no-target expressions", jf_target, 4),
    ):
        final = (expected + n_acc + t_acc) / 3
        assert rows[name] == pytest.approx(
            {"J": expected, "F": expected, "J&F": expected, "N-acc": n_acc, "T-acc": t_acc, "Final": final, "num": num}
        )


def official_revos(pred: np.ndarray, objects: np.ndarray, foreground: np.ndarray) -> tuple[float, float]:
    """A and R of one expression as ReVOS' script computes them, in 8 bits."""
    gt = np.sum(objects, axis=0, dtype=np.uint8)
    a = [np.mean(g == p) for g, p in zip(gt, pred, strict=True)]
    r = [max(1 - ((1 - g) * p).sum() / (s.sum() + 1e-6), 0.0) for g, p, s in zip(gt, pred, foreground, strict=True)]
    return float(np.mean(a)), float(np.mean(r))


def test_revos(write, score) -> None:
    written = write(Layout.revos, "valid", Protocol.revos)
    masks = true_masks(written)
    masks["TAO/valid/v0", "0"][:, :, :20] = False  # misses a part, including some of where two objects overlap
    masks["TAO/valid/v1", "0"] = np.roll(masks["TAO/valid/v1", "0"], 1, axis=2)
    masks["TAO/valid/v0", "1"][2, 0, 0] = True
    masks["TAO/valid/v1", "2"][:, 5, 5] = True
    report = score(written, masks)
    by_key = {(one.video, one.exp_id): one for one in report.expressions}
    for number in (0, 1):
        objects_OTHW = make_video(f"TAO/valid/v{number}", 70 + number).objects_OTHW
        for exp_id, chosen in (("0", [0, 1]), ("1", [2]), ("2", [])):
            key = f"TAO/valid/v{number}", exp_id
            mask, truth, one = masks[key].astype(np.uint8), written.truth[key].masks_THW, by_key[key]
            assert one.j == np.mean(region_similarity(mask, truth))
            assert one.f == np.mean(boundary_accuracy(mask, truth))
            foreground = objects_OTHW.any(0)
            clean = official_revos(mask, truth[None], foreground)
            legacy = official_revos(mask * 255, objects_OTHW[chosen], foreground)
            assert (one.measures["a01"], one.measures["r01"]) == clean
            assert (one.measures["a255"], one.measures["r255"]) == legacy
    assert 0 < by_key["TAO/valid/v0", "0"].measures["r255"] < 1  # where objects overlap, the script wraps around

    official, exact = table(report, "revos"), table(report, "revos_unrounded")
    for name, exp_id in (("referring", "0"), ("reasoning", "1")):
        values = [by_key[f"TAO/valid/v{number}", exp_id].j for number in (0, 1)]
        assert official[name]["J"] == np.mean([round(100 * np.float64(value), 2) for value in values]) / 100
        assert exact[name]["J"] == np.mean(values)
    assert official["referring"]["J"] != exact["referring"]["J"]
    for column in ("J", "F", "J&F", "A01", "R01", "legacy A255", "legacy R255"):
        assert official["overall"][column] == (official["referring"][column] + official["reasoning"][column]) / 2
    assert (official["overall"]["num"], report.groups["non-existent"].num_expressions) == (4, 2)


def test_ref_sav(write, score) -> None:
    written = write(Layout.ref_sav, "valid", Protocol.ref_sav)
    masks = true_masks(written)
    masks["sav_055000", "0"][1] = False
    masks["sav_055001", "1"][:, 5, 5] ^= True
    rows = table(score(written, masks), "ref_sav")
    truth = written.truth["sav_055000", "0"].masks_THW
    accuracy = np.mean([1 - truth[1].sum() / NUM_PIXELS, 1, 1, 1, 1])
    assert rows["long"] == {
        "J": 0.9, "F": 0.9, "J&F": 0.9, "A": pytest.approx((np.round(100 * accuracy, 2) / 100 + 1) / 2), "num": 2
    }  # fmt: skip
    assert rows["short"]["A"] == pytest.approx((3 + np.round(100 - 100 / NUM_PIXELS, 2) / 100) / 4)
    for column in ("J", "F", "J&F", "A"):
        assert rows["overall"][column] == (rows["long"][column] + rows["short"][column]) / 2
    assert rows["overall"]["num"] == 6


def test_groundmore_has_no_answer_outside_its_interval(write, score) -> None:
    """12 of 24 frames, of which 20 are shown: 1.0 inside, J = F = 0 for the object outside it."""
    written = write(Layout.groundmore, "test", Protocol.jf)
    masks = true_masks(written)
    key = "clip0_0100_0104", "0"
    is_inside_T = masks[key].any((1, 2))
    masks[key][~is_inside_T] = masks[key][is_inside_T][0]
    report = score(written, masks)
    assert (len(is_inside_T), report.expressions[0].j, report.expressions[1].j) == (20, is_inside_T.mean(), 1.0)
    assert list(report.groups) == ["Causal", "Descriptive"]


def test_revos_needs_the_foreground_of_every_video(write, score) -> None:
    written = write(Layout.revos, "valid", Protocol.revos)
    file = Path(written.dataset.root) / "mask_dict_foreground.json"
    edit_json(file, lambda content: content["TAO/valid/v1"]["masks_rle"].pop())
    (line,) = score(written, true_masks(written)).unscorable
    assert "foreground.json: expected masks_rle of 5 frames for video 'TAO/valid/v1', found 4 masks" in line
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"mask_dict_foreground\.json"):
        score_predictions(written.dataset, file.parents[1] / "predictions")


def test_reason_vos_scores_the_frames_that_have_a_truth(write, score, capsys: pytest.CaptureFixture[str]) -> None:
    written = write(Layout.reason_vos, "valid", Protocol.jf)
    masks = true_masks(written)
    masks["reason0", "2_1"] = masks["reason0", "1_1"]  # object 1 instead of 2: exp_id 1 stands for both
    for name, frames in (("MOSE_reason0_1", ("00001", "00003")), ("BURST_reason1_1", [f"{t:05d}" for t in range(5)])):
        for frame in frames:
            (Path(written.dataset.root) / "Annotations" / name / f"{frame}.png").unlink()
    for video in ("reason0", "reason1"):
        masks[video, "1_0"][[1, 3]] ^= True  # nobody can tell
    report = score(written, masks)
    found = {(one.video, one.exp_id): (one.j, one.num_frames) for one in report.expressions}
    wrong = np.mean(region_similarity(masks["reason0", "2_1"], written.truth["reason0", "2_1"].masks_THW))
    assert found == {
        ("reason0", "1_0"): (1.0, 3), ("reason0", "1_1"): (1.0, 3), ("reason0", "2_0"): (1.0, 5),
        ("reason0", "2_1"): (wrong, 5), ("reason1", "2_0"): (1.0, 5), ("reason1", "2_1"): (1.0, 5),
    }  # fmt: skip
    assert report.without_truth == tuple(
        f"reason_vos/reason1/1_{number}: no frame has a ground truth" for number in (0, 1)
    )
    assert report.num_unscored == 2 * 2 + 2 * 5
    print_report(report, Console(width=120))
    assert "14 frames without ground truth (over all expressions), not scored\n" in capsys.readouterr().out


def test_long_rvos(write, score, tmp_path: Path) -> None:
    written = write(Layout.long_rvos, "valid", Protocol.long_rvos)
    masks = true_masks(written)
    late, early = (written.truth["valid0", number].masks_THW for number in ("2", "0"))
    assert late.any((1, 2)).tolist() == [False, True, True, True, True]
    masks["valid0", "2"][0], masks["valid0", "2"][4] = early[0], False  # a frame too early: in frames 0 to 3
    masks["valid1", "0"][1:, :, :] = False  # only the first of five frames
    rows = table(score(written, masks), "long_rvos")
    assert rows["static"] == {"J": 0.6, "F": 0.6, "J&F": 0.6, "tIoU": 0.6, "vIoU": 0.6, "num": 2}
    assert rows["dynamic"] == {"J": 1, "F": 1, "J&F": 1, "tIoU": 1, "vIoU": 1, "num": 2}
    assert rows["hybrid"] == {"J": 0.8, "F": 0.8, "J&F": 0.8, "tIoU": 0.8, "vIoU": 0.8, "num": 2}
    assert rows["overall"]["vIoU"] == pytest.approx(0.8)
    assert rows["overall"]["num"] == 6

    (tmp_path / "predictions/valid0/2/00000.png").unlink()  # missing: as wrong as an answer can be
    report = score_predictions(written.dataset, tmp_path / "predictions")
    assert table(report, "long_rvos")["hybrid"]["tIoU"] == 0.8
    assert report.expressions[2].false_positives == 1.0


def test_reason_seg_leaves_out_what_is_ignored(write, score) -> None:
    written = write(Layout.reason_seg, "val", Protocol.images)
    masks = true_masks(written)
    (first, truth), (second, other) = written.truth.items()
    masks[first] = truth.masks_THW | truth.ignore_THW
    masks[second] = other.masks_THW.copy()
    masks[second][0, :, :26] = False
    rows = table(score(written, masks), "images")
    sizes = [int(t.masks_THW.sum()) for t in (truth, other)]
    kept = int(masks[second].sum())
    ious = [sizes[0] / (sizes[0] + 1e-5), kept / (sizes[1] + 1e-5)]
    assert 0 < kept < sizes[1]
    assert rows["overall"] == {
        "cIoU": pytest.approx((sizes[0] + kept) / sum(sizes)), "gIoU": np.mean(ious), "num": 2
    }  # fmt: skip
    assert rows["long"]["gIoU"] == ious[0]


def test_refcoco(write, score) -> None:
    written = write(Layout.refcoco, "val", Protocol.images)
    masks = true_masks(written)
    (first, truth), (second, _), *_ = written.truth.items()
    masks[first] = ~truth.masks_THW
    masks[second][:] = False
    report = score(written, masks)
    rows = table(report, "images")
    assert report.tables[0].note.startswith("Unlike in LISA's script, pixels where polygons")
    areas = [int(t.masks_THW.sum()) for t in written.truth.values()]
    unions = [NUM_PIXELS, *areas[1:]]
    right = [0, 0, *areas[2:]]
    assert rows["overall"]["cIoU"] == pytest.approx(sum(right) / sum(unions))
    assert rows["overall"]["gIoU"] == np.mean([r / (u + 1e-5) for r, u in zip(right, unions, strict=True)])


def test_no_picture_counted_is_no_score(write, tmp_path: Path) -> None:
    written = write(Layout.refcoco, "val", Protocol.images)
    (tmp_path / "predictions").mkdir()
    overall = table(score_predictions(written.dataset, tmp_path / "predictions", Missing.drop), "images")["overall"]
    assert (np.isnan(overall["cIoU"]), np.isnan(overall["gIoU"]), overall["num"]) == (True, True, 0)


def test_visible_frames_and_false_positives(write, score) -> None:
    written = write(Layout.mevis, "valid_u", Protocol.jf)
    masks = true_masks(written)
    key = "valid_u0", "1"  # in sight from the second of five frames on
    masks[key][0, 5, 5] = True
    masks[key][4] = False
    one = score(written, masks).expressions[1]
    assert (one.j, one.j_visible, one.f_visible, one.false_positives) == (3 / 5, 3 / 4, 3 / 4, 1.0)


PROTOCOLS = {
    Layout.mevis: ("valid_u", Protocol.jf),
    Layout.mevis_v2: ("valid_u", Protocol.mevis_v2),
    Layout.ref_youtube_vos_valid: ("valid", Protocol.jf),
    Layout.ref_davis17: ("valid", Protocol.ref_davis17),
    Layout.revos: ("valid", Protocol.revos),
    Layout.ref_sav: ("valid", Protocol.ref_sav),
    Layout.groundmore: ("test", Protocol.jf),
    Layout.reason_vos: ("valid", Protocol.jf),
    Layout.long_rvos: ("valid", Protocol.long_rvos),
    Layout.refcoco: ("val", Protocol.images),
    Layout.reason_seg: ("val", Protocol.images),
}


@pytest.mark.parametrize("layout", PROTOCOLS)
def test_the_form_of_predictions_changes_nothing(layout: Layout, write, tmp_path: Path) -> None:
    written = write(layout, *PROTOCOLS[layout])
    rng = np.random.default_rng(0)
    masks = {key: mask ^ (rng.random(mask.shape) < 0.02) for key, mask in true_masks(written).items()}
    folders = [
        write_png(tmp_path / "0_255", written.dataset, masks),
        write_png(tmp_path / "0_1", written.dataset, masks, value=1),
        write_rle(tmp_path / "rle", written.dataset, masks),
    ]
    first, *others = (score_predictions(written.dataset, folder) for folder in folders)
    for other in others:
        assert replace(other, predictions=first.predictions) == first
    assert first.problems == first.warnings == ()
    assert 0 < first.mean_over_sentences.jf < 1


def test_every_protocol_has_its_class() -> None:
    assert list(PROTOCOL_CLASSES) == list(Protocol)
    assert len(set(PROTOCOL_CLASSES.values())) == len(Protocol)
