"""Our masks as an RVOS submission of lmms-eval, which holds points.

Its ``rvos_*`` tasks (https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/1394, July 2026) ask a model for points of the
object at some frames. Stage 1 scores these; in stage 2 SAM 2.1 makes masks of them, and J and F are those of SAM 2.1's
masks. So its J&F says how well SAM 2.1 follows our points: it is not comparable with ``score.py``, nor with any paper.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glus.config import DatasetConfig
from glus.data.benchmarks.index import read_expressions
from glus.data.frames import FrameStore
from glus.data.predictions import check_predictions_dir, open_predictions
from glus.evaluation.packed import read_complete
from glus.files import write_text
from glus.types import Expression

NOT_COMPARABLE = "points in the masks of glus; J&F of lmms-eval's stage 2 is SAM 2.1's and not comparable"
_OF_THEIR_ANSWER = ("f1", "precision", "recall", "HOTA")


def write_lmms_eval(dataset: DatasetConfig, predictions: str | Path, theirs: str | Path, output: str | Path) -> int:
    """Write a submission with our answers in the place of another model's.

    Args:
        dataset: the split; its sentences are found by video and text.
        predictions: our masks of it.
        theirs: ``<task>_submission.json`` that lmms-eval wrote for any model: a list of records with ``video``,
            ``expression``, ``width``, ``height``, ``n_frames``, ``fps``, ``sampling_fps``.
        output: likewise, with our ``tracks`` and ``prediction``, and without the scores of the other answers.

    Returns:
        How many records it has.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: a record is of a sentence or of frames that the split does not have, or a mask is missing.
    """
    check_predictions_dir(Path(predictions))
    records = json.loads(Path(theirs).read_text(encoding="utf-8"))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{theirs}: expected a list of records, as lmms-eval's rvos_* tasks write it")
    sentences: dict[tuple[str, str], deque[Expression]] = defaultdict(deque)
    for expression in read_expressions(dataset):
        sentences[expression.video, _even(expression.text)].append(expression)
    frames, ours = FrameStore(dataset), []
    for record in records:
        where = f"{theirs}: {record.get('id')}"
        missing = {"video", "expression", "width", "height", "n_frames", "fps"} - set(record)
        if missing:
            raise ValueError(f"{where} has no {', '.join(sorted(missing))}")
        found = sentences[record["video"], _even(record["expression"])]
        if not found:
            raise ValueError(f"{where}: {dataset.name} has no (other) sentence {record['expression']!r} of this video")
        expression = found.popleft()
        if record["n_frames"] != len(expression.frames):
            raise ValueError(f"{where}: {record['n_frames']} frames, of which the split has {len(expression.frames)}")
        ours.append(_answered(record, expression, frames, Path(predictions)))
    write_text(Path(output), json.dumps(ours) + "\n")
    return len(ours)


def _even(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _answered(record: dict[str, Any], expression: Expression, frames: FrameStore, folder: Path) -> dict[str, Any]:
    """The record with our points."""
    rate, stride = record["fps"], record["fps"] / record.get("sampling_fps", 1)
    chosen = sorted({round(number * stride) for number in range(int(len(expression.frames) / stride) + 1)})
    chosen = [frame for frame in chosen if frame < len(expression.frames)]
    size = frames.size(expression.video, expression.frames[0])
    predictions = open_predictions(folder, [expression])
    masks = read_complete(predictions, expression, chosen, size, "a submission needs complete predictions").to_dense()
    tracks, spoken = [], []
    for frame, mask_HW in zip(chosen, masks, strict=True):
        if mask_HW.any():
            share_x, share_y = innermost(mask_HW)
            point = [share_x * record["width"], share_y * record["height"]]
            tracks.append({"time": frame / rate, "frame": frame, "points": {"0": {"point": point}}})
            spoken.append(f"{frame / rate:.2f} 0 {round(1000 * share_x)} {round(1000 * share_y)}")
    text = f'<tracks coords="{"; ".join(spoken)}">{record["expression"]}</tracks>'
    kept = {key: value for key, value in record.items() if key not in _OF_THEIR_ANSWER}
    return {**kept, "prediction": text, "tracks": tracks, "note": NOT_COMPARABLE}


def innermost(mask_HW: np.ndarray) -> tuple[float, float]:
    """The point of a mask that is farthest from its edge, as shares of width and height."""
    height, width = mask_HW.shape
    distance = cv2.distanceTransform(np.pad(mask_HW.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    row, column = np.unravel_index(np.argmax(distance[1:-1, 1:-1]), mask_HW.shape)
    return float(column + 0.5) / width, float(row + 0.5) / height
