"""The zip that a benchmark's server takes, which appears only if everything in it is right.

- MeViS: ``<video>/<exp_id>/<frame>.png``, the folders of the videos at the root of the zip;
- Ref-YouTube-VOS: the same below a folder ``Annotations``.

Every mask is a grey PNG (mode L) of 0 and 255 at the size of the frame. The zip is written beside its place, read back
and checked as a stranger's would be, and only then gets its name. Equal predictions give equal bytes.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.index import by_video, read_expressions
from glus.data.frames import FrameStore
from glus.data.parallel import map_in_processes
from glus.data.rle import Size
from glus.evaluation.predictions import check_predictions_dir, open_predictions
from glus.evaluation.score import CHUNK_FRAMES
from glus.files import atomic_file
from glus.types import Expression, Video

TOP_FOLDERS = {
    Layout.mevis: "",
    Layout.mevis_v2: "",
    Layout.ref_youtube_vos_valid: "Annotations/",
}
"""What stands before ``<video>/`` in the zip, for the layouts that have a server."""
ENCRYPTED = 1
"""Bit of an entry's flags (APPNOTE.TXT of PKWARE, 4.4.4)."""
MAX_NAMED = 20
"""Problems that an error names; the others are counted."""


@dataclass(frozen=True)
class Submission:
    """A finished zip."""

    path: Path
    num_videos: int
    num_expressions: int
    num_masks: int


@dataclass(frozen=True)
class EncodedVideo:
    """The masks of one video for the zip."""

    pngs: dict[str, bytes]
    """By the name of the entry; incomplete if there are problems."""
    problems: tuple[str, ...]


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
        ValueError: a prediction is missing or unusable; the split is not what the authors publish; the benchmark has
            no server.
        OSError: the zip cannot be written. In no case is a half one left behind.
    """
    top = top_folder(dataset)
    output = Path(output)
    if output.suffix != ".zip":
        raise ValueError(f"output={output}: expected the name of a .zip file")
    check_predictions_dir(predictions_dir)
    videos = by_video(read_expressions(dataset))
    check_counts(dataset, videos)
    encode = partial(VideoEncoder, dataset, Path(predictions_dir), top)
    with atomic_file(output) as beside:
        problems = _write(beside, map_in_processes(encode, videos, num_workers))
        _stop(problems, f"{predictions_dir} cannot be submitted")
        _stop(check_zip(beside, dataset, num_workers), f"the zip made of {predictions_dir} is wrong")
    expressions = [expression for video in videos for expression in video]
    return Submission(output, len(videos), len(expressions), sum(len(e.frames) for e in expressions))


def check_zip(path: Path, dataset: DatasetConfig, num_workers: int = 1) -> list[str]:
    """What is wrong with a zip, whoever made it; nothing if the server can take it.

    Args:
        path: the zip.
        dataset: the split it is for.
        num_workers: processes.

    Raises:
        FileNotFoundError: there is no such file, or a file of the dataset is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no zip {path}")
    videos, top = by_video(read_expressions(dataset)), top_folder(dataset)
    try:
        with zipfile.ZipFile(path) as opened:
            names = [info.filename for info in opened.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        return [f"{path} is not a zip: {error}"]
    expected = {name for video in videos for name in entry_names(video, top)}
    if problem := _wrong_top(names, expected, top):
        return [problem]
    problems = [f"{name} is in it {count} times" for name, count in Counter(names).items() if count > 1]
    problems += [f"{name} belongs to no expression" for name in sorted(set(names) - expected)]
    check = partial(VideoChecker, path, dataset, top, frozenset(names))
    return problems + [line for lines in map_in_processes(check, videos, num_workers) for line in lines]


def top_folder(dataset: DatasetConfig) -> str:
    """What stands before ``<video>/`` in the zip.

    Raises:
        ValueError: the benchmark has no server.
    """
    if dataset.layout not in TOP_FOLDERS:
        known = ", ".join(layout.value for layout in TOP_FOLDERS)
        raise ValueError(f"dataset {dataset.name!r} has layout {dataset.layout.value}; servers take {known}")
    return TOP_FOLDERS[dataset.layout]


def check_counts(dataset: DatasetConfig, videos: Sequence[Video]) -> None:
    """Raise ValueError unless the split has the published numbers of videos, expressions and frames."""
    found = {
        "videos": len(videos),
        "expressions": sum(len(video) for video in videos),
        "frames": sum(len(video[0].frames) for video in videos),
    }
    for name, number in found.items():
        published = getattr(dataset.expected, name)
        if published not in (None, number):
            raise ValueError(
                f"dataset {dataset.name!r} has {number} {name}, but the server expects {published}; get the complete "
                f"split (a smaller one of your own: dataset.expected.{name}=null)"
            )


def entry_names(video: Video, top: str) -> list[str]:
    """The names of all masks of a video in the zip."""
    return [_entry_name(expression, frame, top) for expression in video for frame in expression.frames]


class VideoEncoder:
    """Makes the entries of one video at a time."""

    def __init__(self, dataset: DatasetConfig, predictions_dir: Path, top: str) -> None:
        self.predictions_dir, self.top = predictions_dir, top
        self.frames = FrameStore(dataset)

    def __call__(self, video: Video) -> EncodedVideo:
        """The PNGs of a video, or what is wrong with its predictions."""
        size = self.frames.size(video[0].video, video[0].frames[0])
        predictions = open_predictions(self.predictions_dir, video)
        problems = list(predictions.problems)
        pngs: dict[str, bytes] = {}
        for expression in video:
            lines: list[str] = []
            for start in range(0, len(expression.frames), CHUNK_FRAMES):
                frames = range(start, min(start + CHUNK_FRAMES, len(expression.frames)))
                masks, unusable = predictions.read(expression, frames, size)
                lines += unusable.values()
                for frame, mask_HW in zip(frames, masks.to_dense(), strict=True) if not problems else ():
                    pngs[_entry_name(expression, expression.frames[frame], self.top)] = encode_png(mask_HW)
            nothing = predictions.no_answer(expression) if lines else None
            problems += [f"{expression.name}: {nothing}"] if nothing else lines
        return EncodedVideo(pngs, tuple(problems))


class VideoChecker:
    """Checks the entries of one video of a zip at a time."""

    def __init__(self, path: Path, dataset: DatasetConfig, top: str, names: frozenset[str]) -> None:
        self.path, self.top, self.names = path, top, names
        self.frames = FrameStore(dataset)

    def __call__(self, video: Video) -> list[str]:
        """A line for everything that is wrong: once for a missing video or expression, else for each mask."""
        names = entry_names(video, self.top)
        if self.names.isdisjoint(names):
            return [f"video {video[0].video} is missing"]
        size = self.frames.size(video[0].video, video[0].frames[0])
        with zipfile.ZipFile(self.path) as opened:
            return [line for expression in video for line in self._check(opened, expression, size)]

    def _check(self, opened: zipfile.ZipFile, expression: Expression, size: Size) -> Iterator[str]:
        names = entry_names([expression], self.top)
        if self.names.isdisjoint(names):
            yield f"expression {expression.video}/{expression.exp_id} is missing"
            return
        for name in names:
            problem = _wrong_mask(opened, name, size) if name in self.names else "is missing"
            if problem:
                yield f"{name} {problem}"


def encode_png(mask_HW: np.ndarray) -> bytes:
    """A mask, whose foreground is not 0, as a grey PNG of 0 and 255."""
    is_done, data = cv2.imencode(".png", (mask_HW != 0).astype(np.uint8) * 255)
    assert is_done
    return data.tobytes()


def _write(path: Path, videos: Iterator[EncodedVideo]) -> list[str]:
    """Write entries until a problem turns up; all problems of all videos."""
    problems: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as opened:  # PNGs are compressed already
        for video in videos:
            problems += video.problems
            for name, data in video.pngs.items() if not problems else ():
                opened.writestr(zipfile.ZipInfo(name), data)
    return problems


def _wrong_mask(opened: zipfile.ZipFile, name: str, size: Size) -> str | None:
    """What is wrong with a mask in a zip."""
    if opened.getinfo(name).flag_bits & ENCRYPTED:
        return "is encrypted; servers read no passwords"
    try:
        data = opened.read(name)
    # What zipfile raises of an entry: wrong header or checksum, damaged data, cut short, a method of compression
    # that it does not know. None is lost: each becomes this entry's problem, which the check reports and fails with.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        return f"does not unpack: {error}"
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            mode, values_HW = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "is not a readable PNG (damaged or cut short)"
    if mode != "L":
        return f"has mode {mode}; expected L (8-bit grey)"
    if values_HW.shape != tuple(size):
        found, expected = ("x".join(map(str, shape)) for shape in (values_HW.shape, size))
        return f"is {found}, but the video's frames are {expected} (height x width)"
    if not np.isin(values_HW, (0, 255)).all():
        return "has values other than 0 and 255"
    return None


def _wrong_top(names: Sequence[str], expected: set[str], top: str) -> str | None:
    """Whether the zip has its folders at another depth: all else would be misnamed."""
    if expected.intersection(names):
        return None
    first = names[0] if names else "nothing"
    return f"expected {top}<video>/<exp_id>/<frame>.png at the root of the zip, such as {min(expected)}; found {first}"


def _entry_name(expression: Expression, frame: str, top: str) -> str:
    return f"{top}{expression.video}/{expression.exp_id}/{frame}.png"


def _stop(problems: Sequence[str], title: str) -> None:
    """ValueError if there are problems."""
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:MAX_NAMED])
        more = f"\n  ... and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(f"{title}: {len(problems)} problems{listed}{more}")
