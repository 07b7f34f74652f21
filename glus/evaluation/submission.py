"""The zip that a benchmark's server takes, which appears only if everything that goes into it is right.

- MeViS: ``<video>/<exp_id>/<frame>.png``, the folders of the videos at the root of the zip;
- Ref-YouTube-VOS: the same below a folder ``Annotations``.

Every mask is a grey PNG (mode L) of 0 and 255 at the size of the frame. Equal predictions give equal bytes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glus.config import DatasetConfig
from glus.data.benchmarks.index import LAYOUTS, by_video, read_expressions
from glus.data.check import count_split
from glus.data.frames import FrameStore
from glus.data.masks import frame_name
from glus.data.parallel import map_in_processes
from glus.data.predictions import Doubt, check_predictions_dir, count_doubts, encode_png, open_predictions
from glus.evaluation.packed import read_packed
from glus.evaluation.score import chunks
from glus.files import atomic_file
from glus.types import Expression, Video

MAX_NAMED = 20
"""Problems that an error names; the others are counted."""


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
