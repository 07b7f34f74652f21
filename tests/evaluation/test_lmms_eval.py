"""Submissions of lmms-eval: its records with points in our masks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glus.config import DatasetConfig
from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.frames import FrameStore
from glus.evaluation.submission import innermost, write_lmms_eval


def records(dataset: DatasetConfig) -> list[dict[str, Any]]:
    """As lmms-eval writes them, of a model that answered nothing; frames of 28 x 24, whatever those of the split."""
    return [
        {
            "id": f"mevis_track_{number}", "qid": number, "video": e.video, "expression": f"{e.text.upper()}.",
            "prediction": "", "tracks": [], "width": 28, "height": 24, "fps": 2, "sampling_fps": 1,
            "n_frames": len(e.frames), "mask_ids": ["0"], "f1": 0.0, "HOTA": 0.0,
        }
        for number, e in enumerate(read_expressions(dataset))
    ]  # fmt: skip


def test_points_lie_in_our_masks(dataset: DatasetConfig, perfect: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "mevis_submission.json"
    theirs.write_text(json.dumps(records(dataset)))
    assert write_lmms_eval(dataset, perfect, theirs, tmp_path / "ours.json") == 5
    ours, masks, num_points = json.loads((tmp_path / "ours.json").read_text()), open_masks(dataset), 0
    for record, expression in zip(ours, read_expressions(dataset), strict=True):
        assert record["qid"] == int(record["id"].split("_")[-1])
        assert "f1" not in record
        assert "not comparable" in record["note"]
        height, width = FrameStore(dataset).size(expression.video, expression.frames[0])
        target_THW = masks.read(expression, range(len(expression.frames)), (height, width)) > 0
        shown = [frame for frame in range(0, len(expression.frames), 2) if target_THW[frame].any()]
        assert [(track["frame"], track["time"]) for track in record["tracks"]] == [(f, f / 2) for f in shown]
        for track in record["tracks"]:
            ((x, y),) = (point["point"] for point in track["points"].values())
            assert target_THW[track["frame"]][int(y / 24 * height), int(x / 28 * width)]
            num_points += 1
        assert len(re.findall(r"\d+\.\d\d 0 \d+ \d+", record["prediction"])) == len(shown)
    assert num_points > 4


def test_the_innermost_point_is_inside_also_of_what_touches_the_edge() -> None:
    ring = np.ones((20, 30), bool)
    ring[3:17, 3:20] = False
    x, y = innermost(ring)
    assert ring[int(y * 20), int(x * 30)]
    assert x > 0.7
    single = np.zeros((5, 5), bool)
    single[0, 4] = True
    assert innermost(single) == (0.9, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expression": "the moon"}, "mevis_track_0: tiny has no .* sentence 'the moon' of this video"),
        ({"n_frames": 99}, "mevis_track_0: 99 frames, of which the split has"),
        ({"video": None, "id": "x"}, "x: tiny has no"),
    ],
)
def test_what_does_not_fit_is_named(
    dataset: DatasetConfig, perfect: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    theirs = tmp_path / "theirs.json"
    first, *others = records(dataset)
    theirs.write_text(json.dumps([{**first, **change}, *others]))
    with pytest.raises(ValueError, match=message):
        write_lmms_eval(dataset, perfect, theirs, tmp_path / "ours.json")
    theirs.write_text(json.dumps({"records": others}))
    with pytest.raises(ValueError, match="expected a list of records"):
        write_lmms_eval(dataset, perfect, theirs, tmp_path / "ours.json")
    assert not (tmp_path / "ours.json").exists()
