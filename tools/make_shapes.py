"""Generate Shapes, the referring-video benchmark of moving objects, and a contact sheet of samples.

    python tools/make_shapes.py data/shapes --train-videos 800 --valid-videos 60 --num-frames 16 --size 128 --seed 0
    python tools/make_shapes.py data/shapes_youtube --layout ref_youtube_vos

The same settings always give the same files; a folder that is already complete is left as it is, and one with other
settings is never overwritten.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from glus.shapes.scene import KINDS
from glus.shapes.sheet import write_contact_sheet
from glus.shapes.write import SINGLE_OBJECT_KINDS, Progress, count_kinds, write_shapes, write_shapes_youtube

LAYOUTS = {"mevis": (write_shapes, KINDS), "ref_youtube_vos": (write_shapes_youtube, SINGLE_OBJECT_KINDS)}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the splits and contact_sheet.png are written")
    parser.add_argument("--train-videos", type=int, default=800, help="videos of the split train; 0: leave it out")
    parser.add_argument("--valid-videos", type=int, default=60, help="videos of the split valid; 0: leave it out")
    parser.add_argument("--num-frames", type=int, default=16, help="frames of every video")
    parser.add_argument("--size", type=int, default=128, help="side of the square frames in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other videos")
    parser.add_argument("--layout", choices=LAYOUTS, default="mevis", help="whose files to imitate")
    return parser.parse_args(arguments)


def show_progress(split: str, num_videos: int) -> Progress:
    """A callback that keeps one line on a terminal up to date, and is silent elsewhere."""

    def show(done: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == num_videos else ""
            print(f"\r{split}: {done}/{num_videos} videos", end=end, file=sys.stderr, flush=True)

    return show


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the splits and the sheet, then print how many sentences of each kind there are."""
    options = parse_arguments(arguments)
    write, kinds = LAYOUTS[options.layout]
    shape = {"seed": options.seed, "num_frames": options.num_frames, "size": options.size}
    splits = {"train": options.train_videos, "valid": options.valid_videos}
    splits = {split: count for split, count in splits.items() if count != 0}
    try:
        for split, count in splits.items():
            start = time.perf_counter()
            is_new = write(options.folder, split, count, progress=show_progress(split, count), **shape)
            took = f"{count} videos in {time.perf_counter() - start:.1f} s"
            print(f"{options.folder / split}: {took if is_new else 'already there with these settings, left as it is'}")
        sheet = options.folder / "contact_sheet.png"
        if splits:
            write_contact_sheet(sheet, kinds=kinds, **shape)
            print(f"{sheet}: samples of every kind")
    except (OSError, ValueError) as error:
        raise SystemExit(f"make_shapes: {error}") from error
    print_table(options.folder, list(splits), kinds)


def print_table(folder: Path, splits: Sequence[str], kinds: Sequence[str]) -> None:
    """Sentences per kind (rows) and split (columns)."""
    counts = {split: count_kinds(folder, split) for split in splits}
    print("sentences".ljust(12) + "".join(split.rjust(8) for split in splits))
    for kind in kinds:
        print(kind.ljust(12) + "".join(str(counts[split][kind]).rjust(8) for split in splits))
    print("all".ljust(12) + "".join(str(counts[split].total()).rjust(8) for split in splits))


if __name__ == "__main__":
    main()
