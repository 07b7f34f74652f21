"""Generate Shapes, the referring-video benchmark of moving objects, and a contact sheet of samples.

    python tools/make_shapes.py data/shapes --train-videos 800 --valid-videos 112 --num-frames 16 --size 128 --seed 0
    python tools/make_shapes.py data/shapes_youtube --layout ref_youtube_vos

The same settings always give the same files; a folder that is already complete is left as it is, and one with other
settings is never overwritten.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from glus.config.jobs import user_errors, user_path
from glus.shapes.write import LAYOUT_KINDS, count_kinds, write_contact_sheet, write_shapes


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the splits and the sheet, then print how many sentences of each kind there are."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=user_path, help="where the splits and contact_sheet.png are written")
    parser.add_argument("--train-videos", type=int, default=800, help="videos of the split train; 0: leave it out")
    parser.add_argument("--valid-videos", type=int, default=112, help="videos of the split valid; 0: leave it out")
    parser.add_argument("--num-frames", type=int, default=16, help="frames of every video")
    parser.add_argument("--size", type=int, default=128, help="side of the square frames in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other videos")
    parser.add_argument("--layout", choices=LAYOUT_KINDS, default="mevis", help="whose files to imitate")
    options = parser.parse_args(arguments)
    kinds, folder = LAYOUT_KINDS[options.layout], options.folder
    shape = {"seed": options.seed, "num_frames": options.num_frames, "size": options.size}
    splits = {"train": options.train_videos, "valid": options.valid_videos}
    splits = {split: count for split, count in splits.items() if count != 0}
    with user_errors():
        for split, count in splits.items():
            start = time.perf_counter()
            is_new = write_shapes(folder, split, count, layout=options.layout, **shape)
            took = f"{count} videos in {time.perf_counter() - start:.1f} s"
            print(f"{folder / split}: {took if is_new else 'already there with these settings, left as it is'}")
        if splits:
            write_contact_sheet(folder / "contact_sheet.png", kinds=kinds, **shape)
            print(f"{folder / 'contact_sheet.png'}: samples of every kind")
    counts = {split: count_kinds(folder, split) for split in splits}
    print("sentences".ljust(12) + "".join(split.rjust(8) for split in splits))
    for kind in kinds:
        print(kind.ljust(12) + "".join(str(found[kind]).rjust(8) for found in counts.values()))
    print("all".ljust(12) + "".join(str(found.total()).rjust(8) for found in counts.values()))


if __name__ == "__main__":
    main()
