"""Segment what sentences describe in a video of your own: a folder of frames with any names, or a video file.

    python scripts/segment_video.py --video my.mp4 --text "the red car" --text "the man who waves" \\
        --weights glus_shapes --output outputs/my_video

Writes ``<output>/<sentence>/<frame>.png`` (0 or 255, at the frame's own size), ``<output>/overlay.mp4`` and
``<output>/segmentation.json`` (per sentence and frame: share of the frame that is covered, probability of [SEG],
whether the model answered with [SEG]; without it the mask is empty). The output folder appears when all masks are done.
The same from Python: ``glus.segment``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from enum import Enum

from glus.config import SettingsConfig
from glus.config.jobs import user_errors, user_path
from glus.config.overrides import settings, short_help
from glus.inference.segment import Starts, segment
from glus.inference.segmentation import MOVIE_FILE, SEGMENTATION_FILE, sentence_folders
from glus.log import setup_logging


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--video", type=user_path, required=True, help="folder of frames (jpg, png) or video file")
    parser.add_argument("--text", action="append", required=True, help="a sentence; repeat for more")
    parser.add_argument("--weights", type=user_path, required=True, help="model folder, or the run that trained it")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier run in --output")
    parser.add_argument("--allow-cpu", action="store_true", help="run a model of the full size though there is no GPU")
    parser.add_argument("--fps", type=float, help="of overlay.mp4 (default: as long as the video; 24 for a folder)")
    parser.add_argument(
        "--start", type=int, default=0, help="first frame to look at, a number, below 0 from the end (default: 0)"
    )
    parser.add_argument("--end", type=int, help="frame to stop before, likewise (default: none)")
    parser.add_argument("--every", type=int, default=1, help="look at each so many frames only (default: 1)")
    parser.add_argument(
        "--key-frames",
        nargs="+",
        metavar="NUMBER",
        help="the frame that each sentence starts from, or auto: the best by the model (default: the first)",
    )
    add_settings(parser)
    return parser.parse_args(arguments)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each field of ``SettingsConfig``."""
    group = parser.add_argument_group("settings of the model (default: what travels with its weights)")
    for setting in settings(SettingsConfig):
        option, about = f"--{setting.key.replace('_', '-')}", short_help(setting).replace("%", "%%")
        if setting.of is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=about)
        elif issubclass(setting.of, Enum):
            group.add_argument(option, choices=[member.value for member in setting.of], help=about)
        else:
            group.add_argument(option, type=setting.of, help=about)


def chosen_settings(arguments: argparse.Namespace) -> SettingsConfig:
    """What ``add_settings`` has read."""
    given = {setting: getattr(arguments, setting.key) for setting in settings(SettingsConfig)}
    return SettingsConfig(**{s.key: s.of(value) for s, value in given.items() if value is not None})


def chosen_key_frames(given: Sequence[str] | None) -> Starts | None:
    """What ``--key-frames`` says.

    Raises:
        ValueError: neither numbers nor auto.
    """
    if given is None or given == ["auto"]:
        return given and "auto"
    if not all(word.isdecimal() for word in given):
        raise ValueError(f"--key-frames {' '.join(given)}: expected a frame's number for each sentence, or auto")
    return [int(word) for word in given]


def run(arguments: argparse.Namespace) -> None:
    """Segment the video, write everything and say where it is."""
    segmentation = segment(
        arguments.video,
        arguments.text,
        arguments.weights,
        arguments.output,
        settings=chosen_settings(arguments),
        frames=slice(arguments.start, arguments.end, arguments.every),
        key_frames=chosen_key_frames(arguments.key_frames),
        frames_per_second=arguments.fps,
        overwrite=arguments.overwrite,
        show_progress=True,
        allow_cpu=arguments.allow_cpu,
    )
    for number, folder in enumerate(sentence_folders(segmentation.texts)):
        print(f"{segmentation.describe(number)}: {arguments.output / folder}")
    print(f"{arguments.output / MOVIE_FILE}\n{arguments.output / SEGMENTATION_FILE}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    setup_logging()
    with user_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
