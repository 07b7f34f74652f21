"""What the machine is and can do: versions, peaks, tests, where it waits."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glus import distributed
from glus.config.hardware import nominal_tflops
from glus.train.measure import matmul_tflops, synchronize
from tools.qualification.outcome import (
    GIB,
    Absent,
    Goal,
    Outcome,
    Sizes,
    Table,
    describe,
    installed_version,
    key_table,
    need_gpu,
    yes_or_no,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "sam2", "bitsandbytes", "triton", "numpy")
LEAST_MATMUL_SHARE = 0.6
"""Of the maker's figure; a card that is slower is shared, too hot or throttled."""


def environment(sizes: Sizes, folder: Path) -> Outcome:
    """What the machine is, and the peaks that utilisation is measured against."""
    device = distributed.use_device()
    measured = measure_peaks(device)
    machine: dict[str, Any] = {
        "device": describe(device),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    goals = []
    if device.type == "cuda":
        machine |= describe_gpu(device)
        goals.append(yes_or_no("bfloat16 in hardware", torch.cuda.is_bf16_supported(including_emulation=False)))
        nominal, least = nominal_tflops(describe(device)), LEAST_MATMUL_SHARE
        if nominal:
            share = (measured["bfloat16 TFLOP/s"] or 0) / nominal
            goals.append(Goal("matrix products", f"{share:.0%} of nominal", f">= {least:.0%}", share >= least))
    versions = {name: installed_version(name) or "absent" for name in PACKAGES}
    peaks = {name: "unknown" if value is None else f"{value:,.4g}" for name, value in measured.items()}
    tables = [key_table("Machine", machine), key_table("Peaks", peaks), key_table("Versions", versions)]
    return Outcome(goals, tables, {"machine": machine, "peaks": measured, "versions": versions})


def measure_peaks(device: torch.device) -> dict[str, float | None]:
    """Matrix products and memory traffic, measured in seconds, and what the card's maker says."""
    peaks: dict[str, float | None] = {"float32 TFLOP/s": matmul_tflops(device, torch.float32)}
    if device.type == "cuda":
        peaks["bfloat16 TFLOP/s"] = matmul_tflops(device, torch.bfloat16)
        peaks["nominal TFLOP/s"] = nominal_tflops(torch.cuda.get_device_name(device))
    return peaks | {"memory GB/s": copy_bandwidth(device)}


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Bytes read and written per second by the best of ten copies, in 10^9."""
    source = torch.zeros(num_bytes or (GIB if device.type == "cuda" else GIB // 16), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        synchronize(device)
        before = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * source.nbytes / best / 1e9


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Memory, driver, and the attention kernels that are switched on."""
    gpu = torch.cuda.get_device_properties(device)
    kernels = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "flex": importlib.util.find_spec("torch.nn.attention.flex_attention") is not None,
    }
    return {
        "GPUs": torch.cuda.device_count(),
        "memory": f"{gpu.total_memory / GIB:.1f} GiB, {torch.cuda.mem_get_info(device)[0] / GIB:.1f} free",
        "compute capability": f"{gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors",
        "driver": driver_version() or "unknown",
        "CUDA, cuDNN": f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
        "attention": ", ".join(name for name, on in kernels.items() if on),
    }


def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where it does not say."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", file.read_text()) if file.is_file() else None
    return found[1] if found else None


def gpu_tests(sizes: Sizes, folder: Path) -> Outcome:
    """``tests/gpu``."""
    need_gpu()
    if installed_version("pytest") is None:
        raise Absent("pytest is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "report.xml"
        words = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={file}", "tests/gpu"]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
        if not file.is_file():
            raise RuntimeError("pytest wrote no report")
        return judge_tests(read_tests(file))


def read_tests(file: Path) -> dict[str, str]:
    """Name of each test -> passed, skipped, failed or error, by pytest's XML."""
    kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
    cases = ElementTree.parse(file).getroot().iter("testcase")
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (kinds[child.tag] for child in case if child.tag in kinds), "passed"
        )
        for case in cases
    }


def judge_tests(results: Mapping[str, str]) -> Outcome:
    """All passed or were skipped, and one at least passed."""
    counts = Counter(results.values())
    is_met = counts["passed"] > 0 and not counts["failed"] + counts["error"]
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    other = {name: kind for name, kind in results.items() if kind != "passed"}
    tables = [key_table("Not passed", other)] if other else []
    return Outcome([Goal("tests/gpu", found, "all passed or skipped", is_met)], tables, {"tests": dict(results)})


def synchronisation(sizes: Sizes, folder: Path) -> Outcome:
    """How often the host waits for the GPU: in a training micro-step never, in prediction once per chunk."""
    need_gpu()
    device = distributed.use_device()
    training_waits, chunk_waits = count_training_waits(device), count_chunk_waits()
    goals = [
        Goal("training micro-step", str(training_waits.total()), "0", not training_waits),
        Goal("predicted chunk", f"{chunk_waits.total():g}", "<= 1", chunk_waits.total() <= 1),
    ]
    rows = [("training micro-step", place, str(count)) for place, count in training_waits.items()]
    rows += [("predicted chunk", place, f"{count:g}") for place, count in chunk_waits.items()]
    values = {"training": dict(training_waits), "chunk": dict(chunk_waits)}
    return Outcome(goals, [Table("Where it waits", ("in", "at", "times"), rows)] if rows else [], values)


WAIT_WARNING = "called a synchronizing"
"""Of CUDA's warning about a wait; torch's notice that the mode is a prototype speaks of synchronizing too."""


@contextmanager
def count_waits() -> Iterator[Counter[str]]:
    """Count the operations that CUDA itself calls synchronising, by the line of Python that they come from."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if WAIT_WARNING in str(w.message))


def count_training_waits(device: torch.device) -> Counter[str]:
    """Of a micro-step of the small model in bfloat16, with the contrastive loss; the first one moves constants."""
    from glus.config import ContrastiveConfig, LossConfig
    from glus.data.chat.llava import LlavaChat
    from glus.data.loader import collate
    from glus.losses.objective import build_objective
    from glus.models.pretrained import load_model
    from tools import benchmark_training
    from tools.benchmark_inference import SHIPPED

    model = load_model(SHIPPED)
    glus = model.glus.to(device, torch.bfloat16).train()
    options = benchmark_training.parse_arguments([])
    tokenizer = LlavaChat(model.vocabulary, glus.mllm.tokens_per_frame)
    scenes = benchmark_training.draw_scenes(2, options)
    samples = benchmark_training.make_samples(scenes, tokenizer, glus.mllm.clip.image_size, options)
    batch = collate(samples, model.vocabulary.pad_id).to(device)
    objective = build_objective(LossConfig(contrastive=ContrastiveConfig(num_negatives=2)), model.vocabulary.seg_id)

    def micro_step() -> None:
        objective(glus(batch), batch, objective.counts([batch]), np.random.default_rng(0))["total"].backward()

    micro_step()
    with count_waits() as waits:
        micro_step()
    return waits


def count_chunk_waits(chunk_frames: int = 8) -> Counter[str]:
    """Of a predicted chunk: those of four chunks less those of two, so that what happens once per video is left out."""
    from glus.config import SettingsConfig
    from glus.inference.predictor import load_predictor
    from tools.benchmark_inference import SHIPPED, BenchmarkVideo

    predictor, _ = load_predictor(SHIPPED, SettingsConfig(chunk_frames=chunk_frames))
    counted = []
    for num_chunks in (2, 2, 4):  # the first one moves constants
        video = BenchmarkVideo(num_chunks * chunk_frames, 128, 128)
        with count_waits() as waits:
            list(predictor.segment(video, video.texts(3)))
        counted.append(waits)
    more = counted[2] - counted[1]
    return Counter({place: count / 2 for place, count in more.items()})  # type: ignore[arg-type]
