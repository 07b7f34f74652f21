"""Segment what sentences describe in a video of your own: a folder of frames with any names, or a video file.

    python scripts/segment_video.py --video my.mp4 --text "the red car" --text "the man who waves" \\
        --weights outputs/quickstart --output outputs/my_video

Writes ``<output>/<sentence>/<frame>.png`` (0 or 255, at the frame's own size), ``<output>/overlay.mp4`` and
``<output>/summary.json`` (per sentence and frame: share of the frame that is covered, probability of [SEG], whether
the model answered with [SEG]; without it the mask is empty). The output folder appears when everything is done.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from glus.config import SettingsConfig
from glus.data.frames import VideoSource, open_video
from glus.inference.overlay import fit, legend, overlay, palette, write_movie
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.writer import MaskFolder, whole_folder
from glus.log import setup_logging

SUMMARY_FILE = "summary.json"
MOVIE_SIDES = (384, 1280)
"""A movie's longer side in pixels: smaller frames are enlarged, larger ones reduced."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--video", type=Path, required=True, help="folder of frames (jpg, png) or video file")
    parser.add_argument("--text", action="append", required=True, help="a sentence; repeat for more")
    parser.add_argument("--weights", type=Path, required=True, help="model folder, or the run that trained it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier run in --output")
    parser.add_argument("--force-seg", action="store_true", help="draw a mask also where [SEG] is not the likeliest")
    parser.add_argument("--memory-stride", type=int, help="distance of strided memories (default: the model's)")
    parser.add_argument("--fps", type=float, default=24.0, help="speed of overlay.mp4 (default: 24)")
    return parser.parse_args(arguments)


def sentence_folders(texts: Sequence[str]) -> list[str]:
    """Folder names of sentences: their letters and digits, with a number where nothing is left or two are equal.

    >>> sentence_folders(["The red car!", "the red car", "猫"])
    ['the-red-car', 'the-red-car-2', '猫']
    """
    names: list[str] = []
    for number, text in enumerate(texts, start=1):
        name = re.sub(r"\W+", "-", text.lower()).strip("-_")[:60] or "sentence"
        names.append(name if name not in ("sentence", *names) else f"{name}-{number}")
    return names


def segment(
    predictor: VideoPredictor, video: VideoSource, texts: Sequence[str], folders: Sequence[MaskFolder]
) -> Iterator[np.ndarray]:
    """Write the masks of every frame, and yield the frame with them drawn on it, above the legend."""
    colours = palette(len(texts))
    for result in track(predictor.segment(video, texts), description="frames", total=len(video)):
        answers = zip(result.rows, result.masks_RHW, result.scores_R, result.has_seg_R, strict=True)
        for row, mask, score, has_seg in answers:
            folders[row].write(video.names[result.frame], mask, score, has_seg)
        frame = video.read(result.frame)
        long_side = int(np.clip(max(frame.shape[:2]), *MOVIE_SIDES))
        picture = overlay(*fit(frame, result.masks_RHW, long_side), colours)
        yield np.concatenate([picture, legend(texts, colours, picture.shape[1])])


def run(arguments: argparse.Namespace) -> None:
    """Segment the video and write everything.

    Raises:
        FileNotFoundError: no video or no weights.
        ValueError: they are damaged, or the output folder must not be written.
    """
    texts = [text.strip() for text in arguments.text]
    if not all(texts):
        raise ValueError("--text: expected a sentence, found nothing")
    palette(len(texts))  # too many sentences are better refused now than after the first frame
    with ExitStack() as stack:
        output = stack.enter_context(whole_folder(arguments.output, arguments.overwrite, mark=SUMMARY_FILE))
        video = open_video(arguments.video)
        settings = SettingsConfig(memory_stride=arguments.memory_stride, force_seg=arguments.force_seg or None)
        predictor, _ = load_predictor(arguments.weights, settings)
        folders = [stack.enter_context(MaskFolder(output / name)) for name in sentence_folders(texts)]
        write_movie(output / "overlay.mp4", segment(predictor, video, texts, folders), arguments.fps)
        sentences = summarize(texts, folders)
        source = {"video": str(arguments.video), "weights": str(arguments.weights), "num_frames": len(video)}
        text = json.dumps({**source, "sentences": sentences}, indent=1, ensure_ascii=False)
        (output / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    for sentence in sentences:
        print(
            f"{sentence['text']}: {len(video)} masks, {sentence['without_seg']} without [SEG], "
            f"{sentence['empty_masks']} empty: {arguments.output / sentence['folder']}"
        )
    print(f"{arguments.output / 'overlay.mp4'}\n{arguments.output / SUMMARY_FILE}")


def summarize(texts: Sequence[str], folders: Sequence[MaskFolder]) -> list[dict[str, Any]]:
    """What was answered to each sentence, over all frames and in each."""
    return [
        {
            "text": text,
            "folder": folder.path.name,
            "without_seg": sum(not answer["has_seg"] for answer in folder.answers),
            "empty_masks": sum(answer["area"] == 0 for answer in folder.answers),
            "frames": folder.answers,
        }
        for text, folder in zip(texts, folders, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    setup_logging()
    try:
        run(parse_arguments(arguments))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
