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

from glus.config import Precision, SettingsConfig
from glus.config.jobs import user_errors, user_path
from glus.inference.segment import segment
from glus.inference.segmentation import ANSWERS_FILE, MOVIE_FILE, sentence_folders
from glus.log import setup_logging


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--video", type=user_path, required=True, help="folder of frames (jpg, png) or video file")
    parser.add_argument("--text", action="append", required=True, help="a sentence; repeat for more")
    parser.add_argument("--weights", type=user_path, required=True, help="model folder, or the run that trained it")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier run in --output")
    parser.add_argument("--force-seg", action="store_true", help="draw a mask also where [SEG] is not the likeliest")
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        help="to compute with (default: the model's; on a CPU fp32, which needs 4 bytes a parameter)",
    )
    parser.add_argument("--memory-stride", type=int, help="distance of strided memories (default: the model's)")
    parser.add_argument("--allow-cpu", action="store_true", help="run a model of the full size though there is no GPU")
    parser.add_argument("--fps", type=float, help="of overlay.mp4 (default: the video's average; 24 for a folder)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Segment the video, write everything and say where it is."""
    settings = SettingsConfig(
        precision=Precision(arguments.precision) if arguments.precision else None,
        memory_stride=arguments.memory_stride,
        force_seg=arguments.force_seg or None,
    )
    segmentation = segment(
        arguments.video,
        arguments.text,
        arguments.weights,
        arguments.output,
        settings=settings,
        frames_per_second=arguments.fps,
        overwrite=arguments.overwrite,
        show_progress=True,
        allow_cpu=arguments.allow_cpu,
    )
    for number, folder in enumerate(sentence_folders(segmentation.texts)):
        print(f"{segmentation.describe(number)}: {arguments.output / folder}")
    print(f"{arguments.output / MOVIE_FILE}\n{arguments.output / ANSWERS_FILE}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    setup_logging()
    with user_errors():
        run(parse_arguments(arguments))


if __name__ == "__main__":
    main()
