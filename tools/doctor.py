"""Is this machine ready? Versions, GPU, memory, weights and data, and what to do about each failure.

    python tools/doctor.py
    python tools/doctor.py --weights weights --data data --mixture refvos_a --quantization

Exit status 1 if a check fails. What is supported but was not tested is a note, as is what the full size alone needs on
a machine without GPU, where everything else runs. Weights and data are looked for, in ``weights`` and ``data``; what is
missing there is a note, or where ``--weights`` and ``--data`` name a folder, a failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

try:
    from glus.config import GIB, TrainConfig
    from glus.config.jobs import user_errors, user_path
    from glus.data.loader import PREFETCHED, SHARED_MEMORY, shared_memory_advice
    from glus.files import PROJECT
    from glus.models.foreign import how_to_get
except ModuleNotFoundError as error:
    if error.name != "glus":
        raise
    sys.exit("error: glus itself is not installed (a lock file holds only what it needs): pip install --no-deps -e .")

CONFIGS = PROJECT / "configs"
MIXTURE = "refvos_s"
"""Whose datasets are looked for where no other is named."""
DISK_GIB = 20.0
"""A few checkpoints of the full size (3.6 GB each) and predictions."""
FRAME_PIXELS = 1080 * 1920
"""Of the largest frames of the benchmarks."""
GPU_GIB = 22.0
"""Memory of a GPU for the full size, of those that are sold as of 24."""
PROCESS_GIB, CPU_GIB = 4.0, 22.0
"""Memory for the full size: of each process that has a GPU, its weights' share being mapped from their files; or of a
process without one (machines that are sold as of 24 GB; scripts/test.sh --full measures it)."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
CUDA_DRIVERS = {"cu130": 580, "cu128": 570, "cu126": 525}
"""Index of torch's wheels -> NVIDIA driver that it needs at least (CUDA release notes; of CUDA 12, which runs on every
driver from 525 on, the nearest)."""
MAJOR_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA -> driver that it needs at least, by minor-version compatibility."""
Installed = Callable[[str], str]


class Finding(NamedTuple):
    """One row of the table."""

    verdict: str
    """ok, note or FAIL."""
    name: str
    found: str
    expected: str
    advice: str
    """What to do; empty where nothing is wrong."""


def finding(name: str, good: bool, found: str, expected: str, advice: str = "", is_needed: bool = True) -> Finding:
    """A row by whether something is ``good``; what is not ``is_needed`` is a note then, no failure."""
    verdict = "ok" if good else "FAIL" if is_needed else "note"
    return Finding(verdict, name, found, expected, "" if good else advice)


def check_python(version: str, supported: str) -> Finding:
    """Python itself."""
    good = Version(version) in SpecifierSet(supported)
    return finding("Python", good, version, supported, "make the environment with a supported Python")


def check_versions(requirements: Sequence[str], lock: dict[str, str], installed: Installed) -> Iterator[Finding]:
    """Each direct dependency: fails outside its supported range, and is noted where it is not the lock file's.

    Args:
        requirements: of the project, as its metadata has them; those of extras are left out.
        lock: package -> version; empty if there is no lock file for this Python.
        installed: gives a package's version, or raises PackageNotFoundError.
    """
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, locked = requirement.name, lock.get(canonicalize_name(requirement.name))
        expected = f"{requirement.specifier}, locked {locked}" if locked else f"{requirement.specifier}"
        advice = f"pip install '{name}=={locked}'" if locked else f"pip install '{requirement}'"
        try:
            found = installed(name)
        except importlib.metadata.PackageNotFoundError:
            yield finding(name, False, "not installed", expected, f"pip install '{requirement}'")
            continue
        public = Version(found).public  # 2.13.0+cpu is 2.13.0
        is_supported = requirement.specifier.contains(public, prereleases=True)  # as containers of NVIDIA have them
        advice = f"supported; {advice} is what was tested" if is_supported else advice
        is_tested = is_supported and locked in (None, public)
        yield finding(name, is_tested, found, expected, advice, is_needed=not is_supported)


def read_lock(file: Path) -> dict[str, str]:
    """Package -> version of a lock file that applies on this machine; empty if there is no such file."""
    lines = file.read_text().splitlines() if file.is_file() else []
    pins = [Requirement(pin) for line in lines if (pin := line.partition("#")[0].strip())]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}


def read_driver() -> str | None:
    """Version of NVIDIA's driver, such as 570.124.06; "of unknown version", or None where there is no driver."""
    text = DRIVER_FILE.read_text() if DRIVER_FILE.is_file() else ""
    if not text and (program := shutil.which("nvidia-smi")):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True).stdout or "no answer"
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "of unknown version" if text else None


def driver_advice(driver: str, cuda: str | None, requirement: str) -> str:
    """What makes CUDA usable where there is a driver.

    Args:
        driver: its version.
        cuda: that torch is built for; None: for the CPU.
        requirement: the project's, of torch.
    """
    branch = int(driver.split(".")[0]) if driver[0].isdigit() else 0
    wheels = [name for name, least in CUDA_DRIVERS.items() if branch >= least]
    if not branch:
        return "mend the driver: nvidia-smi must name its version and the GPUs"
    if cuda and branch >= MAJOR_DRIVERS.get(int(cuda.split(".")[0]), max(MAJOR_DRIVERS.values())):
        hint = "see nvidia-smi, CUDA_VISIBLE_DEVICES, and in a container --gpus all"
        return f"torch's CUDA {cuda} fits this driver, so the GPU is hidden or broken: {hint}"
    if not wheels:
        return f"update the driver to {min(CUDA_DRIVERS.values())} or later"
    install = f"pip install '{requirement}' --index-url https://download.pytorch.org/whl/{wheels[0]}"
    return f"pip uninstall -y torch && {install}, or update the driver"


def check_gpu(driver: str | None, requirement: str) -> Iterator[Finding]:
    """GPUs, bfloat16 on them, and NCCL between them.

    Args:
        driver: see ``read_driver``.
        requirement: the project's, of torch.
    """
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        found = f"driver {driver}, unusable by torch for {f'CUDA {cuda}' if cuda else 'CPUs'}" if driver else "none"
        expected = "usable" if driver else "needed for the full size only"
        advice = driver_advice(driver, cuda, requirement) if driver else ""
        yield finding("GPU", driver is None, found, expected, advice)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"
        is_enough, advice = gpu.total_memory >= GPU_GIB * GIB, "the small model fits; tools/plan.py says what else does"
        yield finding(f"GPU {index}", is_enough, found, "24 GiB or more for the full size", advice, is_needed=False)
    advice = "train with model.precision=fp32, or on a GPU of the Ampere generation or later"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield finding("bfloat16", has_bfloat16, "usable" if has_bfloat16 else "not in hardware", "usable", advice)
    has_nccl, advice = torch.distributed.is_nccl_available(), "install a CUDA build of torch (Linux)"
    yield finding("NCCL", has_nccl, "available" if has_nccl else "missing", "available", advice)


def check_bitsandbytes() -> Finding:
    """bitsandbytes, for ``model.llm.quantization``."""
    has_library, has_gpu = importlib.util.find_spec("bitsandbytes") is not None, torch.cuda.is_available()
    found = f"{'installed' if has_library else 'not installed'}, {'GPU' if has_gpu else 'no GPU'}"
    advice = "run on a GPU" if has_library else "pip install 'glus[quantization]'"
    return finding("bitsandbytes", has_library and has_gpu, found, "installed, GPU", advice)


def check_space(name: str, folder: Path, least_gib: float, advice: str, is_needed: bool = True) -> Finding:
    """Room in a folder, or in the nearest one above it that exists."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / GIB
    return finding(name, free >= least_gib, f"{free:.1f} GiB free", f"{least_gib:.3g} GiB", advice, is_needed)


def check_memory(total_gib: float, num_gpus: int) -> Finding:
    """The machine's memory, which the full size alone needs."""
    least = num_gpus * PROCESS_GIB or CPU_GIB
    advice = "fewer processes, or a smaller model" if num_gpus else "the full size does not run here"
    expected = f"{least:g} GiB for the full size"
    return finding("memory", total_gib >= least, f"{total_gib:.0f} GiB", expected, advice, is_needed=False)


def check_room(outputs: Path, mixture: str, num_gpus: int) -> Iterator[Finding]:
    """What the full size fills; on a machine without a GPU, where it does not run, want of room is a note.

    Raises:
        ValueError: there is no such mixture.
    """
    advice = "" if num_gpus else "for the full size only: "
    yield check_space("disk", outputs, DISK_GIB, f"{advice}free some, or paths.outputs=...", num_gpus > 0)
    least = shared_memory_gib(mixture, max(num_gpus, 1))
    if SHARED_MEMORY.is_dir():
        yield check_space("shared memory", SHARED_MEMORY, least, advice + shared_memory_advice(least), num_gpus > 0)


def shared_memory_gib(mixture: str, num_processes: int) -> float:
    """What loader processes of the full size pass micro-batches through, if all that they keep ready is large.

    Raises:
        ValueError: there is no such mixture.
    """
    run = compose_training(mixture)
    pictures = run.trainer.micro_batch_size * run.frames.num_query
    micro_batch = pictures * FRAME_PIXELS * (3 + run.data.expressions_per_video)  # colours, and a mask per sentence
    return float(num_processes * run.data.num_workers * PREFETCHED * micro_batch / GIB)


def compose_training(mixture: str) -> DictConfig:
    """What training at full size on a mixture in ``configs/data`` is set to, and in ``hydra.runtime.choices`` the file
    that each part of it comes from.

    Raises:
        ValueError: there is no such mixture.
    """
    known = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
    if mixture not in known:
        raise ValueError(f"--mixture {mixture}: expected one of {', '.join(known)}")
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"data={mixture}"], return_hydra_config=True)


def check_weights(folder: Path, is_needed: bool = True) -> Iterator[Finding]:
    """The starting weights of the full size, as ``configs/model/glus_7b.yaml`` names them."""
    run = compose_training(MIXTURE)
    run.paths.weights = str(folder)
    for part in ("clip", "llm", "segmenter"):
        place = run.model[part].weights
        yield check_path(f"weights of {part}", place, f"{how_to_get(place)}, or set model.{part}.weights", is_needed)


def check_data(folder: Path, mixture: str, is_needed: bool = True) -> Iterator[Finding]:
    """The datasets of a mixture in ``configs/data``.

    Raises:
        ValueError: there is no such mixture.
    """
    run = compose_training(mixture)
    run.paths.data = str(folder)
    for place, name in run.hydra.runtime.choices.items():
        group, _, key = place.partition("@")
        if group == "dataset":
            advice = f"see configs/README.md, then python tools/check_data.py dataset={name}"
            yield check_path(f"dataset {name}", OmegaConf.select(run, key).root, advice, is_needed)


def check_path(name: str, path: str, advice: str, is_needed: bool) -> Finding:
    """Something that must be there."""
    is_there = Path(path).exists()
    return finding(name, is_there, "present" if is_there else "missing", path, advice, is_needed)


def read_requirements(installed: Installed) -> tuple[str, list[str], Finding]:
    """Supported versions of Python, dependencies, and whether the project itself is installed.

    Args:
        installed: gives a package's version, or raises PackageNotFoundError.
    """
    try:
        found = finding("glus", True, installed("glus"), "installed")
        python = importlib.metadata.metadata("glus")["Requires-Python"]
        return python, importlib.metadata.requires("glus") or [], found
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
        found = finding("glus", False, "not installed", "installed", "pip install --no-deps -e .")
        return project["requires-python"], project["dependencies"], found


def examine(options: argparse.Namespace) -> Iterator[Finding]:
    """All checks."""
    python, requirements, glus = read_requirements(importlib.metadata.version)
    yield check_python(platform.python_version(), python)
    yield glus
    lock = options.lock or PROJECT / "requirements-py{}{}.lock".format(*sys.version_info)
    yield from check_versions(requirements, read_lock(lock), importlib.metadata.version)
    (torch_requirement,) = (text for text in requirements if Requirement(text).name == "torch")
    yield from check_gpu(read_driver(), torch_requirement)
    if options.quantization:
        yield check_bitsandbytes()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield check_memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, num_gpus)
    yield from check_room(options.outputs, options.mixture, num_gpus)
    yield from check_weights(options.weights or Path("weights"), bool(options.weights))
    yield from check_data(options.data or Path("data"), options.mixture, bool(options.data))


def report(checks: Sequence[Finding], console: Console) -> None:
    """Print the table."""
    table = Table("", "check", "found", "expected", "what to do")
    for check in checks:
        table.add_row(*check)
    console.print(table)
    verdicts = Counter(check.verdict for check in checks)
    notes = f", {verdicts['note']} with a note" if verdicts["note"] else ""
    failed = f"{verdicts['FAIL']} of {len(checks)} checks failed" if verdicts["FAIL"] else ""
    console.print(f"{failed or f'all {len(checks)} checks passed'}{notes}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=user_path, help="folder that must hold the starting weights of the full size")
    parser.add_argument("--data", type=user_path, help="folder that must hold the datasets of --mixture")
    parser.add_argument("--mixture", default=MIXTURE, help="file in configs/data (default: %(default)s)")
    parser.add_argument("--outputs", type=user_path, default=Path("outputs"), help="where runs go (%(default)s)")
    parser.add_argument("--quantization", action="store_true", help="bitsandbytes must be usable")
    parser.add_argument("--lock", type=user_path, help="lock file (else the one for this Python beside pyproject.toml)")
    options = parser.parse_args(arguments)
    with user_errors():
        checks = list(examine(options))
    report(checks, Console(width=None if sys.stdout.isatty() else 140, markup=False))
    sys.exit(any(check.verdict == "FAIL" for check in checks))


if __name__ == "__main__":
    main()
