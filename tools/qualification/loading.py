"""The full size: made of random weights, written, and loaded in another process."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glus import distributed
from glus.train.measure import forget_peak, peak_memory, synchronize
from tools.qualification.outcome import GIB, Absent, Goal, Outcome, Sizes, key_table, yes_or_no
from tools.qualify import WEIGHTS_FOLDER

if TYPE_CHECKING:
    from glus.config import SettingsConfig
    from glus.inference.predictor import VideoPredictor

ANSWERS_FILE = "answers.npz"
MOST_DEVICE_LOAD, MOST_HOST_LOAD = 1.15, 4 * GIB
"""Peaks of a GPU's process while it loads: times the weights, and bytes of the host."""
MOST_CHANGED = 1e-3
"""Share of the pixels, and of a score, that other kernels may change."""


def full_size(sizes: Sizes, folder: Path) -> Outcome:
    """The network with random weights made on the device: sane numbers, an answer to each question; written to disk."""
    from tools import benchmark_inference

    device = distributed.use_device()
    started = time.perf_counter()
    predictor = benchmark_inference.build(sizes.model)
    synchronize(device)
    seconds = time.perf_counter() - started
    parameters = list(predictor.glus.parameters())
    num_bytes = sum(parameter.nbytes for parameter in parameters)
    is_finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
    masks, scores = answers(predictor, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / ANSWERS_FILE, masks=np.packbits(masks), scores=scores)
    values = {
        "parameters": f"{sum(parameter.numel() for parameter in parameters):,}",
        "weights": f"{num_bytes / GIB:.2f} GiB",
        "made in": f"{seconds:.1f} s",
        "written": _write_weights(predictor, sizes, folder, num_bytes),
    }
    goals = [
        yes_or_no("weights are finite", is_finite),
        yes_or_no("every sentence is answered in every frame", bool(np.isfinite(scores).all() and scores.min() >= 0)),
    ]
    return Outcome(goals, [key_table("Full size" if sizes.model != "tiny" else "Shipped model", values)], values)


def answers(predictor: VideoPredictor, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Masks (T, E, H, W) and scores (T, E) of two sentences in four frames."""
    from tools.benchmark_inference import BenchmarkVideo

    video = BenchmarkVideo(4, *sizes.frame_size)
    results = list(predictor.segment(video, video.texts(2)))
    return np.stack([result.masks_RHW for result in results]), np.stack([result.scores_R for result in results])


def _write_weights(predictor: VideoPredictor, sizes: Sizes, folder: Path, num_bytes: int) -> str:
    """Write a model folder to load, if the disk has room; what was done, in words."""
    from glus.config import ModelFolderConfig
    from glus.models.pretrained import save_model
    from glus.tokens import Vocabulary
    from tools.benchmark_inference import SHIPPED, model_config

    if sizes.model == "tiny":
        return "no: it lies in assets/"
    free = shutil.disk_usage(folder).free
    if free < 1.1 * num_bytes + GIB:
        return f"no: {free / GIB:.0f} GiB free"
    shutil.rmtree(folder / WEIGHTS_FOLDER, ignore_errors=True)
    started = time.perf_counter()
    config = ModelFolderConfig(model_config(sizes.model), predictor.frames, predictor.inference)
    save_model(folder / WEIGHTS_FOLDER, predictor.glus.state_dict(), config, Vocabulary(SHIPPED), metadata={})
    return f"in {time.perf_counter() - started:.1f} s"


def loading(sizes: Sizes, folder: Path) -> Outcome:
    """A model folder into a fresh process: seconds, peaks, and the same answers as before it was written."""
    device = distributed.use_device()
    if not (folder / ANSWERS_FILE).is_file():
        raise Absent("the stage full_size left no answers to compare with")
    forget_peak(device)
    with host_peak() as host:
        started = time.perf_counter()
        predictor = load_written(sizes, folder)
        synchronize(device)
        seconds = time.perf_counter() - started
    num_bytes = sum(parameter.nbytes for parameter in predictor.glus.parameters())
    peak = peak_memory(device)
    goals = compare_answers(*answers(predictor, sizes), folder / ANSWERS_FILE)
    values = {
        "seconds": f"{seconds:.1f}",
        "GB/s": f"{num_bytes / seconds / 1e9:.2f}",
        "weights": f"{num_bytes / GIB:.2f} GiB",
        "peak, GPU" if device.type == "cuda" else "peak, resident": f"{peak / GIB:.2f} GiB",
        "peak, host, without mapped files": f"{host[0] / GIB:.2f} GiB",
    }
    if device.type == "cuda" and sizes.model != "tiny":
        share = peak / num_bytes
        goals.append(
            Goal("GPU's peak", f"{share:.2f} x the weights", f"<= {MOST_DEVICE_LOAD}", share <= MOST_DEVICE_LOAD)
        )
        most = MOST_HOST_LOAD
        goals.append(Goal("host's peak", f"{host[0] / GIB:.1f} GiB", f"<= {most / GIB:.0f} GiB", host[0] <= most))
    return Outcome(goals, [key_table("Loading", values)], values)


def compare_answers(masks: np.ndarray, scores: np.ndarray, file: Path) -> list[Goal]:
    """Whether ``answers`` are those that ``full_size`` wrote."""
    before = np.load(file)
    pixels = float((masks != np.unpackbits(before["masks"], count=masks.size).reshape(masks.shape)).mean())
    score = float((np.abs(scores - before["scores"]) / np.maximum(np.maximum(scores, before["scores"]), 1e-30)).max())
    found = {"pixels that changed": pixels, "largest change of a score": score}
    return [
        Goal(name, f"{share:.2%}", f"<= {MOST_CHANGED:.1%}", share <= MOST_CHANGED) for name, share in found.items()
    ]


def load_written(sizes: Sizes, folder: Path, settings: SettingsConfig | None = None) -> VideoPredictor:
    """What ``full_size`` built, from disk.

    Args:
        sizes: which model.
        folder: of the results.
        settings: override the model folder's.

    Raises:
        Absent: the disk had no room for it.
    """
    from glus.config import SettingsConfig
    from glus.inference.predictor import VideoPredictor, load_predictor
    from tools.benchmark_inference import SHIPPED, model_config, stand_in_tokenizer

    if sizes.model == "tiny":
        return load_predictor(SHIPPED, settings)[0]
    if not (folder / WEIGHTS_FOLDER).is_dir():
        raise Absent("no room on the disk for the full size's weights")
    as_made = SettingsConfig(precision=model_config(sizes.model).precision)  # on a CPU too
    loaded = load_predictor(folder / WEIGHTS_FOLDER, settings or as_made)[0]
    return VideoPredictor(loaded.glus, stand_in_tokenizer(loaded.glus), loaded.frames, loaded.inference)


@contextmanager
def host_peak(interval: float = 0.02) -> Iterator[list[int]]:
    """The most memory of this process that no file backs (Linux: RssAnon), looked at ever so often, in bytes."""
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(interval):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], 1024 * int(status.split("RssAnon:")[1].split()[0]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
