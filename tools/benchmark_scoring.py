"""What scoring costs: ours against the official procedure written plainly, in one run.

    python tools/benchmark_scoring.py --json scoring.json

CPU time of one warm process without threads, the best of repeats, on pairs of blobs that cover 0.5-20 % of the frame.
The official procedure is ``glus/evaluation/reference.py``: numpy and cv2.dilate with the disk of
skimage.morphology.disk, which is computed with numpy here. Its scores are compared with ours by ``==``.

End to end is a folder of PNG predictions scored against a ``mask_dict.json``. The official way is that of MeViS'
eval_mevis.py: cv2.imread, pycocotools' decode, all masks of a video in an array, J and F frame by frame; ours is what
``scripts/score.py`` runs. Last, a ``mask_dict.json`` as large as that of MeViS train is generated and packed, and the
packed copy opened in processes of their own, from the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numba
import numpy as np
from PIL import Image
from pycocotools import mask as coco
from rich import box
from rich.console import Console
from rich.table import Table

from glus.config import DatasetConfig, Layout
from glus.data.mask_pack import MaskPack
from glus.data.png import read_png
from glus.data.rle import Size
from glus.evaluation.packed import BitMasks
from glus.evaluation.reference import plain_boundary_accuracy, plain_region_similarity
from glus.evaluation.score import score_predictions
from glus.files import write_text

SHARES = (0.005, 0.2)
"""Smallest and largest share of the frame that an object covers."""
FRAMES_PER_ANNOTATION = 60
"""Length of the videos in the generated ``mask_dict.json``."""
OPENINGS = 5
"""Processes that open the packed masks, one after the other; the best counts."""
OPEN_CACHE = """
import json, sys, time
from pathlib import Path
from glus.data.mask_pack import MaskPack

def resident_mb():
    import resource
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

before, start = resident_mb(), time.perf_counter()
pack = MaskPack(Path(sys.argv[1]))
seconds = time.perf_counter() - start
ids = list(pack)
for annotation_id in (ids[0], ids[len(ids) // 2], ids[-1]):
    pack[annotation_id]
print(json.dumps({"ms": 1000 * seconds, "mb": resident_mb() - before}))
"""


@dataclass(frozen=True)
class Pairs:
    """Predictions and targets, (T, H, W) uint8 of 0/1."""

    prediction: np.ndarray
    target: np.ndarray

    @property
    def size(self) -> Size:
        """(H, W)."""
        return self.target.shape[1], self.target.shape[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(480, 854), (720, 1280), (1080, 1920)], metavar="HxW"
    )
    parser.add_argument("--headline", type=_size, default=(720, 1280), metavar="HxW", help="size of the ratios")
    parser.add_argument("--frames", type=int, default=16, help="pairs of masks of each size")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each measurement is repeated, at least")
    parser.add_argument("--mask-dict-mb", type=float, default=411.0, help="size of the generated mask_dict.json")
    options = parser.parse_args(arguments)
    if options.headline not in options.sizes:
        parser.error("--headline must be one of --sizes")
    cv2.setNumThreads(1)
    pairs = {size: draw_pairs(size, options.frames) for size in options.sizes}
    in_memory = {size: time_in_memory(pairs[size], options.seconds) for size in options.sizes}
    with tempfile.TemporaryDirectory() as folder:
        end_to_end = time_end_to_end(pairs[options.headline], Path(folder), options.seconds)
        cache = measure_cache(pairs[options.headline], Path(folder), options.mask_dict_mb)
    results = summarize(options.headline, in_memory, end_to_end, cache)
    print_results(results, Console() if sys.stdout.isatty() else Console(width=110))
    if options.json:
        write_text(options.json, json.dumps(results, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------- masks


def draw_pairs(size: Size, num_frames: int) -> Pairs:
    """Blobs of all shares of the frame, each with a prediction that is off by a part of its radius (J about 0.8)."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    masks = np.zeros((2, num_frames, *size), np.uint8)
    for frame, share in enumerate(np.geomspace(*SHARES, num_frames)):
        radius = np.sqrt(share * size[0] * size[1] / np.pi)
        stretch = rng.uniform(0.8, 1.25)
        centre = rng.uniform(0.35, 0.65, 2) * size[::-1]
        outline = 1 + wobble(rng, angles, 0.15)
        shifts = (np.zeros(2), rng.normal(0, 0.1 * radius, 2))
        for masks_HW, off, shift in zip(masks[:, frame], (0, wobble(rng, angles, 0.12)), shifts, strict=True):
            x, y = radius * (outline + off) * (np.cos(angles) * stretch, np.sin(angles) / stretch)
            points = np.stack([x, y], axis=1) + centre + shift
            cv2.fillPoly(masks_HW, [np.rint(points).astype(np.int32)], 1)
    return Pairs(prediction=masks[1], target=masks[0])


def wobble(rng: np.random.Generator, angles: np.ndarray, strength: float) -> np.ndarray:
    """A smooth random curve over the angles."""
    waves = range(2, 12)
    return sum(
        (rng.normal(0, strength / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in waves), 0 * angles
    )


def encode(masks_THW: np.ndarray) -> list[bytes]:
    """COCO's compressed run-length code of each mask."""
    return [coco.encode(np.asfortranarray(mask_HW))["counts"] for mask_HW in masks_THW]


# -------------------------------------------------------------------------------------------------- timing


def cpu_ms(function: Callable[[], object], num_frames: int, seconds: float) -> float:
    """CPU milliseconds a frame, the best of at least three calls and ``seconds`` of them, after a first one."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1000 * min(times) / num_frames


def time_in_memory(pairs: Pairs, seconds: float) -> dict[str, float]:
    """CPU ms a frame of J and F by the official procedure (``official``) and by ours from dense masks, from run-length
    codes and from packed masks; the mean J and F of the masks.

    Raises:
        AssertionError: scores differ.
    """
    bools = pairs.prediction.astype(bool), pairs.target.astype(bool)
    codes = [[[code] for code in encode(masks)] for masks in (pairs.prediction, pairs.target)]
    packed = BitMasks.from_dense(pairs.prediction), BitMasks.from_dense(pairs.target)
    ours: dict[str, Callable[[], JFScores]] = {
        "dense": lambda: compare(BitMasks.from_dense(pairs.prediction), BitMasks.from_dense(pairs.target)),
        "rle": lambda: compare(*(BitMasks.from_rle(masks, pairs.size) for masks in codes)),
        "packed": lambda: compare(*packed),
    }
    expected = official_scores(*bools)
    for name, function in ours.items():
        scores = function()
        assert np.array_equal([scores.j_T, scores.f_T], expected), f"{name}: scores differ from the official ones"
    functions = {"official": lambda: official_scores(*bools), **ours}
    times = {f"{name}_ms": cpu_ms(function, len(bools[0]), seconds) for name, function in functions.items()}
    return times | {"mean_j": float(expected[0].mean()), "mean_f": float(expected[1].mean())}


def official_scores(prediction_THW: np.ndarray, target_THW: np.ndarray) -> np.ndarray:
    """(2, T): J and F of bool masks, frame by frame, by the plain procedure."""
    void_HW = np.zeros(target_THW.shape[1:], bool)
    frames = [(*frame, void_HW) for frame in zip(prediction_THW, target_THW, strict=True)]
    return np.array([[measure(*f) for f in frames] for measure in (plain_region_similarity, plain_boundary_accuracy)])


# ------------------------------------------------------------------------------------------------ end to end


def time_end_to_end(pairs: Pairs, root: Path, seconds: float) -> dict[str, float]:
    """CPU ms a frame from PNGs and a ``mask_dict.json`` to the mean J and F; and of decoding the PNGs alone.

    Raises:
        AssertionError: scores differ.
    """
    dataset, predictions = write_dataset(pairs, root)
    masks = json.loads((root / "valid_u" / "mask_dict.json").read_text())["0"]
    files = sorted(predictions.rglob("*.png"))

    def official() -> tuple[float, float]:
        prediction = np.stack([np.asarray(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)) for file in files]) > 0
        target = np.stack([coco.decode(mask) for mask in masks]) > 0
        j, f = official_scores(prediction, target).mean(axis=1)
        return float(j), float(f)

    def ours() -> tuple[float, float]:
        (expression,) = score_predictions(dataset, predictions).expressions
        return expression.j, expression.f

    assert ours() == official(), "scores differ from the official ones"
    functions: dict[str, Callable[[], object]] = {
        "official": official,
        "official_png": lambda: [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files],
        "ours": ours,
        "ours_png": lambda: [read_png(file, pairs.size) for file in files],
    }
    return {f"{name}_ms": cpu_ms(function, len(files), seconds) for name, function in functions.items()}


def write_dataset(pairs: Pairs, root: Path) -> tuple[DatasetConfig, Path]:
    """A split of one video and one expression in the MeViS layout, and predictions as 8-bit grey PNGs of Pillow, which
    the published inference scripts and ours write."""
    split, frames = root / "valid_u", [f"{frame:05d}" for frame in range(len(pairs.target))]
    images, predictions = split / "JPEGImages" / "video", root / "predictions"
    images.mkdir(parents=True)
    (predictions / "video" / "0").mkdir(parents=True)
    for frame, mask_HW in zip(frames, pairs.prediction, strict=True):
        Image.new("RGB", pairs.size[::-1]).save(images / f"{frame}.jpg")
        Image.fromarray(mask_HW * 255).save(predictions / "video" / "0" / f"{frame}.png")
    expression = {"exp": "the blob", "obj_id": [0], "anno_id": [0]}
    videos = {"video": {"vid_id": 0, "frames": frames, "expressions": {"0": expression}}}
    masks = [{"size": pairs.size, "counts": code.decode()} for code in encode(pairs.target)]
    (split / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (split / "mask_dict.json").write_text(json.dumps({"0": masks}))
    return DatasetConfig("blobs", Layout.mevis, str(root), "valid_u"), predictions


# ---------------------------------------------------------------------------------------------------- cache


def measure_cache(pairs: Pairs, root: Path, megabytes: float) -> dict[str, float]:
    """Pack a generated ``mask_dict.json``, then open it in new processes, from the system's page cache.

    Returns:
        Size of the source in MB, seconds to pack it, wall-clock ms to open the packed copy and read three masks' codes,
        and by how many MB of resident memory the process grew.
    """
    source = root / "mask_dict.json"
    write_mask_dict(source, pairs, int(megabytes * 1e6))
    start = time.perf_counter()
    MaskPack(source)
    packing_s = time.perf_counter() - start
    command = [sys.executable, "-c", OPEN_CACHE, str(source)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(OPENINGS)]
    opened = [json.loads(run.stdout) for run in runs]
    return {
        "source_mb": source.stat().st_size / 1e6,
        "packing_s": packing_s,
        "open_ms": min(run["ms"] for run in opened),
        "open_mb": max(run["mb"] for run in opened),
    }


def write_mask_dict(path: Path, pairs: Pairs, num_bytes: int) -> None:
    """Write about ``num_bytes`` of annotations whose codes repeat those of the pairs; one frame in ten is null."""
    codes = cycle(encode(np.concatenate([pairs.prediction, pairs.target])))
    written, annotation_id = 0, 0
    with path.open("w") as file:
        while written < num_bytes:
            entries: list[dict[str, Any] | None] = [
                {"size": pairs.size, "counts": code.decode()} for code in islice(codes, FRAMES_PER_ANNOTATION)
            ]
            entries[::10] = [None] * len(entries[::10])
            written += file.write(f"{', ' if written else '{'}{json.dumps(str(annotation_id))}: {json.dumps(entries)}")
            annotation_id += 1
        file.write("}")


# --------------------------------------------------------------------------------------------------- report


def summarize(
    headline: Size, in_memory: dict[Size, dict[str, float]], end_to_end: dict[str, float], cache: dict[str, float]
) -> dict[str, Any]:
    """All figures; how many times faster ours is (``*_ratio``) is at the headline's size."""
    times = in_memory[headline]
    return {
        "rle_ratio": times["official_ms"] / times["rle_ms"],
        "dense_ratio": times["official_ms"] / times["dense_ms"],
        "packed_ratio": times["official_ms"] / times["packed_ms"],
        "end_to_end_ratio": end_to_end["official_ms"] / end_to_end["ours_ms"],
        "cache_open_ms": cache["open_ms"],
        "cache_open_mb": cache["open_mb"],
        "headline": _by(headline),
        "in_memory": {_by(size): measured for size, measured in in_memory.items()},
        "end_to_end": end_to_end,
        "cache": cache,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "numba": numba.__version__,
        },
    }


def print_results(results: dict[str, Any], console: Console) -> None:
    """A table of J and F in memory, one of the way from files to scores, and a line about the cache."""
    sizes, end_to_end, cache = results["in_memory"].values(), results["end_to_end"], results["cache"]
    table = _table("J and F in memory, CPU ms a frame (times faster)", *results["in_memory"])
    for name, label in (
        ("official", "official: numpy, cv2.dilate"),
        ("dense", "ours, from dense masks"),
        ("rle", "ours, from run-length codes"),
        ("packed", "ours, already packed"),
    ):
        table.add_row(label, *(_ratio(times["official_ms"], times[f"{name}_ms"]) for times in sizes))
    table.add_row("mean J, mean F of the masks", *(f"{times['mean_j']:.2f}, {times['mean_f']:.2f}" for times in sizes))
    console.print(table)
    table = _table(f"From PNG files to scores at {results['headline']}, CPU ms a frame", "official", "ours")
    for name, label in (("", "all"), ("png_", "of which decoding the PNGs")):
        official_ms, ours_ms = (end_to_end[f"{who}_{name}ms"] for who in ("official", "ours"))
        table.add_row(label, _ratio(official_ms, official_ms), _ratio(official_ms, ours_ms))
    console.print(table)
    console.print(
        f"mask_dict.json of {cache['source_mb']:.0f} MB: packed once in {cache['packing_s']:.1f} s; opened in "
        f"{cache['open_ms']:.1f} ms with {cache['open_mb']:.1f} MB of resident memory a process",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _ratio(official_ms: float, ms: float) -> str:
    return f"{ms:.3f} ({official_ms / ms:.1f}x)" if ms != official_ms else f"{ms:.2f}"


def _size(text: str) -> Size:
    height, width = (int(side) for side in text.split("x"))
    return height, width


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


if __name__ == "__main__":
    main()
