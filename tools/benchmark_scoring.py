"""What scoring costs: ours against the official procedure written plainly, in one run.

    python tools/benchmark_scoring.py --json scoring.json

CPU time of one warm process without threads, the best of repeats, on pairs of blobs that cover 0.5-20 % of the frame.
The official procedure is written here plainly, with numpy and cv2.dilate; the tests hold every faster way against it,
and its scores are compared with ours by ``==``. Source: F. Perazzi et al., "A Benchmark Dataset and Evaluation
Methodology for Video Object Segmentation" (CVPR 2016), as computed by the public davis2017-evaluation, which MeViS,
Ref-YouTube-VOS and their relatives all reuse. Its quirks are part of the definition:

- two empty masks agree perfectly (J = F = 1), so one false pixel in a frame without the object costs everything;
- a mask that covers the whole image has no boundary, hence F = 1 against an empty mask and 0 against most others;
- the tolerance of F grows with the image diagonal, so scores depend on the resolution they are computed at.

End to end is a folder of PNG predictions scored against a ``mask_dict.json``. The official way is that of MeViS'
eval_mevis.py: cv2.imread, pycocotools' decode, all masks of a video in an array, J and F frame by frame; ours is what
``scripts/score.py`` runs.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

if not __package__:  # run as a program: what lies beside it is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus.config import DatasetConfig, Layout
from glus.data.masks import Size, unpack_runs
from glus.evaluation.packed import BitMasks, compare
from glus.evaluation.score import score_predictions
from tools.benchmarks.measuring import Report, case_table, command_line, finish, installed_version, read_size

SHARES = (0.005, 0.2)
"""Smallest and largest share of the frame that an object covers."""


# ---------------------------------------------------------------------------------------- official procedure


def plain_region_similarity(prediction_HW: np.ndarray, target_HW: np.ndarray, void_HW: np.ndarray) -> float:
    """J of one frame: intersection over union of two bool masks outside a bool void mask; 1 if both are empty."""
    union = np.sum((prediction_HW | target_HW) & ~void_HW)
    if union == 0:
        return 1.0
    return float(np.sum(prediction_HW & target_HW & ~void_HW) / union)


def plain_boundary_accuracy(prediction_HW: np.ndarray, target_HW: np.ndarray, void_HW: np.ndarray) -> float:
    """F of one frame: harmonic mean of precision and recall of the boundary pixels of two bool masks.

    Void pixels (bool) are taken out of both masks before their boundaries are drawn. A boundary pixel matches if it
    lies in the other boundary dilated by a disk; nothing comes from outside the image.
    """
    radius = int(np.ceil(0.008 * np.linalg.norm(target_HW.shape)))
    prediction, target = plain_boundary(prediction_HW & ~void_HW), plain_boundary(target_HW & ~void_HW)
    num_prediction, num_target = np.sum(prediction), np.sum(target)
    if num_prediction == 0 or num_target == 0:
        return float(num_prediction == num_target)
    disk = plain_disk(radius)
    dilated_prediction = cv2.dilate(prediction.astype(np.uint8), disk)
    dilated_target = cv2.dilate(target.astype(np.uint8), disk)
    precision = np.sum(prediction * dilated_target) / float(num_prediction)
    recall = np.sum(target * dilated_prediction) / float(num_target)
    if precision + recall == 0:
        return 0.0
    return float(2 * precision * recall / (precision + recall))


def plain_boundary(mask_HW: np.ndarray) -> np.ndarray:
    """bool map of the pixels of a bool mask that differ from their right, lower or lower right neighbour.

    Neighbours outside the image are not compared, so the last row looks only right, the last column only down, and the
    last pixel never counts.
    """
    east, south, south_east = np.zeros_like(mask_HW), np.zeros_like(mask_HW), np.zeros_like(mask_HW)
    east[:, :-1] = mask_HW[:, 1:]
    south[:-1, :] = mask_HW[1:, :]
    south_east[:-1, :-1] = mask_HW[1:, 1:]
    boundary = (mask_HW ^ east) | (mask_HW ^ south) | (mask_HW ^ south_east)
    boundary[-1, :] = mask_HW[-1, :] ^ east[-1, :]
    boundary[:, -1] = mask_HW[:, -1] ^ south[:, -1]
    boundary[-1, -1] = False
    return boundary


def plain_disk(radius: int) -> np.ndarray:
    """uint8 (2 radius + 1, 2 radius + 1): 1 where x^2 + y^2 <= radius^2, which is ``skimage.morphology.disk``."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares[None, :] <= radius * radius).astype(np.uint8)


# --------------------------------------------------------------------------------------------------- masks


def draw_pairs(size: Size, num_frames: int) -> np.ndarray:
    """Blobs of all shares of the frame, each with a prediction that is off by a part of its radius (J about 0.8).

    Returns:
        Targets and predictions, (2, T, H, W) uint8 of 0/1.
    """
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
    return masks


def wobble(rng: np.random.Generator, angles: np.ndarray, strength: float) -> np.ndarray:
    """A smooth random curve over the angles."""
    waves = range(2, 12)
    return sum(
        (rng.normal(0, strength / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in waves), 0 * angles
    )


def encode_masks(masks_THW: np.ndarray) -> list[bytes]:
    """COCO's compressed run-length code of each mask."""
    return [coco.encode(np.asfortranarray(mask_HW))["counts"] for mask_HW in masks_THW]


# -------------------------------------------------------------------------------------------------- timing


def cpu_ms(functions: dict[str, Callable[[], object]], num_frames: int, seconds: float) -> dict[str, float]:
    """CPU milliseconds a frame (``*_ms``), the best of at least three calls and ``seconds`` of them, after a first one;
    and how many times faster than the ``official`` one each is (``*_ratio``)."""
    best = {}
    for name, function in functions.items():
        function()
        times: list[float] = []
        while len(times) < 3 or sum(times) < seconds:
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        best[name] = 1000 * min(times) / num_frames
    ratios = {f"{name}_ratio": best["official"] / ms for name, ms in best.items() if name != "official"}
    return {f"{name}_ms": ms for name, ms in best.items()} | ratios


def time_in_memory(pairs: np.ndarray, seconds: float) -> dict[str, float]:
    """CPU ms a frame of J and F by the official procedure (``official``) and by ours from dense masks, from run-length
    codes and from packed masks; the mean J and F of the masks.

    Raises:
        AssertionError: scores differ.
    """
    target, prediction = pairs
    bools, size = pairs.astype(bool), target.shape[1:]
    codes = [encode_masks(masks) for masks in (prediction, target)]
    packed = BitMasks.from_dense(prediction), BitMasks.from_dense(target)
    ours = {
        "dense": lambda: compare(BitMasks.from_dense(prediction), BitMasks.from_dense(target)),
        "rle": lambda: compare(
            *(BitMasks.united([[unpack_runs(code, size)] for code in masks], size) for masks in codes)
        ),
        "packed": lambda: compare(*packed),
    }
    expected = official_scores(bools[1], bools[0])
    for name, function in ours.items():
        scores = function()
        assert np.array_equal([scores.j_T, scores.f_T], expected), f"{name}: scores differ from the official ones"
    times = cpu_ms({"official": lambda: official_scores(bools[1], bools[0]), **ours}, len(target), seconds)
    return times | {"mean_j": float(expected[0].mean()), "mean_f": float(expected[1].mean())}


def official_scores(prediction_THW: np.ndarray, target_THW: np.ndarray) -> np.ndarray:
    """(2, T): J and F of bool masks, frame by frame, by the plain procedure."""
    void_HW = np.zeros(target_THW.shape[1:], bool)
    frames = [(*frame, void_HW) for frame in zip(prediction_THW, target_THW, strict=True)]
    return np.array([[measure(*f) for f in frames] for measure in (plain_region_similarity, plain_boundary_accuracy)])


# ------------------------------------------------------------------------------------------------ end to end


def time_end_to_end(pairs: np.ndarray, root: Path, seconds: float) -> dict[str, float]:
    """CPU ms a frame from PNGs and a ``mask_dict.json`` to the mean J and F.

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
    return cpu_ms({"official": official, "ours": ours}, len(files), seconds)


def write_dataset(pairs: np.ndarray, root: Path) -> tuple[DatasetConfig, Path]:
    """A split of one video and one expression in the MeViS layout, and predictions as 8-bit grey PNGs of Pillow, which
    the published inference scripts and ours write."""
    split, predictions, size = root / "valid_u", root / "predictions", pairs.shape[2:]
    images, frames = split / "JPEGImages" / "video", [f"{frame:05d}" for frame in range(pairs.shape[1])]
    for folder in (images, predictions / "video" / "0"):
        folder.mkdir(parents=True)
    for frame, mask_HW in zip(frames, pairs[1], strict=True):
        Image.new("RGB", size[::-1]).save(images / f"{frame}.jpg")
        Image.fromarray(mask_HW * 255).save(predictions / "video" / "0" / f"{frame}.png")
    expression = {"exp": "the blob", "obj_id": [0], "anno_id": [0]}
    videos = {"video": {"vid_id": 0, "frames": frames, "expressions": {"0": expression}}}
    (split / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    masks = [{"size": size, "counts": code.decode()} for code in encode_masks(pairs[0])]
    (split / "mask_dict.json").write_text(json.dumps({"0": masks}))
    return DatasetConfig("blobs", Layout.mevis, str(root), "valid_u"), predictions


# --------------------------------------------------------------------------------------------------- report


def report_speed(headline: str, in_memory: dict[str, dict[str, float]], end_to_end: dict[str, float]) -> Report:
    """All figures; how many times faster ours is (``*_ratio``) is at the headline's size."""
    versions = {name: installed_version(name) for name in ("numpy", "opencv-python-headless", "numba")}
    values: dict[str, Any] = {name: in_memory[headline][name] for name in ("dense_ratio", "rle_ratio", "packed_ratio")}
    values |= {"end_to_end_ratio": end_to_end["ours_ratio"], "headline": headline, "in_memory": in_memory}
    values |= {"end_to_end": end_to_end, "versions": {"python": platform.python_version(), **versions}}
    tables = [
        case_table("J and F in memory, CPU ms a frame (ratio: times faster than official)", in_memory),
        case_table("From PNG files to scores, likewise", {headline: end_to_end}),
    ]
    return Report(tables, values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line(__doc__)
    sizes: dict[str, Any] = {"type": read_size, "metavar": "HxW"}
    parser.add_argument("--sizes", nargs="+", default=[(480, 854), (720, 1280), (1080, 1920)], **sizes)
    parser.add_argument("--headline", default=(720, 1280), help="size of the ratios", **sizes)
    parser.add_argument("--frames", type=int, default=16, help="pairs of masks of each size")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each measurement is repeated, at least")
    options = parser.parse_args(arguments)
    if options.headline not in options.sizes:
        parser.error("--headline must be one of --sizes")
    cv2.setNumThreads(1)
    pairs = {"{}x{}".format(*size): draw_pairs(size, options.frames) for size in options.sizes}
    headline = "{}x{}".format(*options.headline)
    in_memory = {size: time_in_memory(masks, options.seconds) for size, masks in pairs.items()}
    with tempfile.TemporaryDirectory() as folder:
        end_to_end = time_end_to_end(pairs[headline], Path(folder), options.seconds)
    finish(report_speed(headline, in_memory, end_to_end), options.json)


if __name__ == "__main__":
    main()
