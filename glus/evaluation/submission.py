"""What servers and other programs take of predictions, which appears only if everything that goes into it is right.

``build_submission`` makes the zip of a benchmark's server:

- MeViS: ``<video>/<exp_id>/<frame>.png``, the folders of the videos at the root of the zip;
- Ref-YouTube-VOS: the same below a folder ``Annotations``.

Every mask is a grey PNG (mode L) of 0 and 255 at the size of the frame. Equal predictions give equal bytes.

``write_lmms_eval`` makes an RVOS submission of lmms-eval, which holds points. Its ``rvos_*`` tasks
(https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/1394, July 2026) ask a model for points of the object at some
frames. Stage 1 scores these; in stage 2 SAM 2.1 makes masks of them, and J and F are those of SAM 2.1's masks. So its
J&F says how well SAM 2.1 follows our points: it is not comparable with ``score.py``, nor with any paper.
"""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from glus.config import DatasetConfig
from glus.data.benchmarks.index import LAYOUTS, by_video, count_split, read_expressions
from glus.data.frames import FrameStore
from glus.data.masks import frame_name
from glus.data.parallel import map_in_processes
from glus.data.predictions import Doubt, check_predictions_dir, count_doubts, encode_png, open_predictions
from glus.evaluation.packed import read_complete, read_packed
from glus.evaluation.score import chunks
from glus.files import atomic_file, write_text
from glus.types import Expression, Video

MAX_NAMED = 20
"""Problems that an error names; the others are counted."""
NOT_COMPARABLE = "points in the masks of glus; J&F of lmms-eval's stage 2 is SAM 2.1's and not comparable"
_OF_THEIR_ANSWER = ("f1", "precision", "recall", "HOTA")


@dataclass(frozen=True)
class Submission:
    """A finished zip."""

    path: Path
    num_videos: int
    num_expressions: int
    num_masks: int
    doubts: list[str]
    """Masks that cover a whole frame, as an object may, or as it comes of inverted or lost ones."""


def build_submission(
    dataset: DatasetConfig, predictions_dir: str | Path, output: str | Path, num_workers: int = 1
) -> Submission:
    """Write the zip of a split's predictions, PNGs or run-length codes.

    Args:
        dataset: the split; needs no ground truth.
        predictions_dir: folder of predictions.
        output: the zip; replaced if it is there.
        num_workers: processes; the zip does not depend on it.

    Raises:
        FileNotFoundError: the folder of predictions or a file of the dataset does not exist.
        ValueError: a prediction is missing or unusable, or has more than two values: a server takes few submissions,
            and only its author knows the threshold; the split is not what the authors publish; the benchmark has
            no server.
        OSError: the zip cannot be written. In no case is a half one left behind.
    """
    if LAYOUTS[dataset.layout].zip_folder is None:
        known = ", ".join(layout.value for layout, row in LAYOUTS.items() if row.zip_folder is not None)
        raise ValueError(f"dataset {dataset.name!r} has layout {dataset.layout.value}; servers take {known}")
    output = Path(output)
    if output.suffix != ".zip":
        raise ValueError(f"output={output}: expected the name of a .zip file")
    check_predictions_dir(predictions_dir)
    expressions = read_expressions(dataset)
    _check_counts(dataset, expressions)
    videos = by_video(expressions)
    problems: list[str] = []
    doubts: dict[str, Doubt] = {}
    encoder = VideoEncoder(dataset, Path(predictions_dir))
    with atomic_file(output) as beside:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as opened:  # PNGs are compressed already
            for pngs, of_video, doubts_of_video in map_in_processes(encoder, videos, num_workers):
                problems += of_video
                doubts |= doubts_of_video
                for name, data in pngs.items() if not problems else ():
                    opened.writestr(zipfile.ZipInfo(name), data)
        unclear = count_doubts({name: doubt for name, doubt in doubts.items() if doubt is not Doubt.full})
        problems += [f"{line}; make them 0 and 255, at the threshold that is meant" for line in unclear]
        if problems:
            listed = "".join(f"\n  {problem}" for problem in problems[:MAX_NAMED])
            more = f"\n  ... and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
            raise ValueError(f"{predictions_dir} cannot be submitted: {len(problems)} problems{listed}{more}")
    num_frames = sum(len(e.frames) for e in expressions)
    return Submission(output, len(videos), len(expressions), num_frames, count_doubts(doubts))


class VideoEncoder:
    """Makes the entries of one video at a time."""

    def __init__(self, dataset: DatasetConfig, predictions_dir: Path) -> None:
        self.predictions_dir, self.frames = predictions_dir, FrameStore(dataset)
        self.zip_folder = LAYOUTS[dataset.layout].zip_folder

    def __call__(self, video: Video) -> tuple[dict[str, bytes], list[str], dict[str, Doubt]]:
        """The PNGs of a video by the name of their entry, incomplete if anything is wrong with its predictions, which
        the second lists; and what is doubtful about them."""
        try:
            size = self.frames.size(video[0].video, video[0].frames[0])
        except (ValueError, FileNotFoundError) as error:
            return {}, [str(error)], {}
        predictions = open_predictions(self.predictions_dir, video)
        problems = list(predictions.problems)
        pngs: dict[str, bytes] = {}
        full: dict[str, Doubt] = {}
        for expression in video:
            lines: list[str] = []
            for frames in chunks(len(expression.frames)):
                masks, unusable = read_packed(predictions, expression, frames, size)
                lines += unusable.values()
                for frame, mask_HW in zip(frames, masks.to_dense(), strict=True) if not problems else ():
                    name = f"{expression.video}/{expression.exp_id}/{expression.frames[frame]}.png"
                    pngs[f"{self.zip_folder}{name}"] = encode_png(mask_HW)
                    if mask_HW.all():
                        full[frame_name(expression, frame)] = Doubt.full
            nothing = predictions.no_answer(expression) if lines else None
            problems += [f"{expression.name}: {nothing}"] if nothing else lines
        return pngs, problems, predictions.doubts | full


def _check_counts(dataset: DatasetConfig, expressions: Sequence[Expression]) -> None:
    """Raise ValueError unless what the split has is as many as is published."""
    for name, number in count_split(expressions).items():
        published = getattr(dataset.expected, name)
        if published not in (None, number):
            raise ValueError(
                f"dataset {dataset.name!r} has {number} {name}, but the server expects {published}; get the complete "
                f"split (a smaller one of your own: dataset.expected.{name}=null)"
            )


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
    spread = {round(number * stride) for number in range(int(len(expression.frames) / stride) + 1)}
    chosen = sorted(frame for frame in spread if frame < len(expression.frames))
    size = frames.size(expression.video, expression.frames[0])
    predictions = open_predictions(folder, [expression])
    masks = read_complete(predictions, expression, chosen, size).to_dense()
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
