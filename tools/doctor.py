"""Is this machine ready? Versions, GPU, memory, weights and data, and what to do about each failure.

    python tools/doctor.py
    python tools/doctor.py --weights weights --data data --mixture refvos_a --quantization

Exit status 1 if a check fails. A machine without GPU is reported and does not fail: everything but the full size runs
on it. Weights and data are looked for where ``--weights`` and ``--data`` say; without these they are not asked for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
DISK_GIB = 20.0
"""A few checkpoints of the full size (3.6 GB each) and predictions."""
SHARED_MEMORY_GIB = 1.0
"""What loader processes pass batches through."""
Installed = Callable[[str], str]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    found: str
    expected: str
    advice: str = ""
    """What to do; empty where nothing is wrong."""
    is_failure: bool = False


def judge(name: str, good: bool, found: str, expected: str, advice: str) -> Check:
    """A check that fails with its advice unless it is good."""
    return Check(name, found, expected, "" if good else advice, not good)


def check_python(version: str, supported: str) -> Check:
    """Python itself."""
    good = Version(version) in SpecifierSet(supported)
    return judge("Python", good, version, supported, "make the environment with a supported Python")


def check_versions(requirements: Sequence[str], lock: dict[str, str], installed: Installed) -> Iterator[Check]:
    """Each direct dependency: inside its supported range, and as the lock file has it.

    Args:
        requirements: of the project, as its metadata has them; those of extras are left out.
        lock: package -> version; empty if there is no lock file for this Python.
        installed: gives a package's version, or raises PackageNotFoundError.
    """
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, locked = requirement.name, lock.get(_normal(requirement.name))
        expected = f"{requirement.specifier}" + (f", locked {locked}" if locked else "")
        try:
            found = installed(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "not installed", expected, f"pip install '{requirement}'", is_failure=True)
            continue
        public = Version(found).public  # 2.13.0+cpu is 2.13.0
        advice = f"pip install '{name}=={locked}'" if locked else f"pip install '{requirement}'"
        good = public in requirement.specifier and locked in (None, public)
        yield judge(name, good, found, expected, advice)


def read_lock(file: Path) -> dict[str, str]:
    """Package -> version of a lock file that applies on this machine; empty if there is no such file."""
    if not file.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    pins = (Requirement(line) for line in lines if line)
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {_normal(pin.name): str(pin.specifier).removeprefix("==") for pin in here}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_gpu() -> Iterator[Check]:
    """GPUs, bfloat16 on them, and NCCL between them."""
    if not torch.cuda.is_available():
        yield Check("GPU", "none", "needed for the full size only")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Check(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB", "24 GiB or more for the full size")
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    advice = "train with model.precision=fp32, or on a GPU of the Ampere generation or later"
    yield judge("bfloat16", supported, "usable" if supported else "not in hardware", "usable", advice)
    nccl = torch.distributed.is_nccl_available()
    advice = "install a CUDA build of torch (Linux)"
    yield judge("NCCL", nccl, "available" if nccl else "missing", "available", advice)


def check_quantization() -> Check:
    """bitsandbytes, for ``model.llm.quantization``."""
    has_library, has_gpu = importlib.util.find_spec("bitsandbytes") is not None, torch.cuda.is_available()
    found = f"{'installed' if has_library else 'not installed'}, {'GPU' if has_gpu else 'no GPU'}"
    advice = "run on a GPU" if has_library else "pip install 'glus[quantization]'"
    return judge("bitsandbytes", has_library and has_gpu, found, "installed, GPU", advice)


def check_space(name: str, folder: Path, least_gib: float, advice: str) -> Check:
    """Room in a folder, or in the nearest one above it that exists."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / GIB
    return judge(name, free >= least_gib, f"{free:.1f} GiB free", f"{least_gib:g} GiB", advice)


def check_weights(folder: Path) -> Iterator[Check]:
    """The starting weights of the full size, as ``configs/model/glus_7b.yaml`` names them."""
    file = ROOT / "configs" / "model" / "glus_7b.yaml"
    config = OmegaConf.merge({"paths": {"weights": str(folder)}}, OmegaConf.load(file))
    for part in ("clip", "llm", "segmenter"):
        yield check_path(
            f"weights of {part}",
            Path(OmegaConf.select(config, f"{part}.weights")),
            f"put them there, or set model.{part}.weights",
        )


def check_data(folder: Path, mixture: str) -> Iterator[Check]:
    """The datasets of a mixture in ``configs/data``.

    Raises:
        ValueError: there is no such mixture.
    """
    file = ROOT / "configs" / "data" / f"{mixture}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ValueError(f"--mixture {mixture}: expected one of {', '.join(known)}")
    for entry in OmegaConf.load(file).defaults:
        ((_, name),) = entry.items()
        dataset = OmegaConf.load(ROOT / "configs" / "dataset" / f"{name}.yaml")
        root = OmegaConf.merge({"paths": {"data": str(folder)}}, dataset).root
        yield check_path(f"dataset {name}", Path(root), f"see README, then python tools/check_data.py dataset={name}")


def check_path(name: str, path: Path, advice: str) -> Check:
    """Something that must be there."""
    return judge(name, path.exists(), "present" if path.exists() else "missing", str(path), advice)


def examine(options: argparse.Namespace) -> Iterator[Check]:
    """All checks."""
    metadata = importlib.metadata.metadata("glus")
    yield check_python(platform.python_version(), metadata["Requires-Python"])
    major, minor = sys.version_info[:2]
    lock = options.lock or ROOT / f"requirements-py{major}{minor}.lock"
    requirements = importlib.metadata.requires("glus") or []
    yield from check_versions(requirements, read_lock(lock), importlib.metadata.version)
    yield from check_gpu()
    if options.quantization:
        yield check_quantization()
    yield check_space("disk", options.outputs, DISK_GIB, "free some, or put runs elsewhere: paths.outputs=...")
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield check_space("shared memory", shared, SHARED_MEMORY_GIB, "docker run --shm-size=8g, or data.num_workers=0")
    if options.weights:
        yield from check_weights(options.weights)
    if options.data:
        yield from check_data(options.data, options.mixture)


def report(checks: Sequence[Check], console: Console) -> None:
    """Print the table."""
    table = Table("", "check", "found", "expected", "what to do")
    for check in checks:
        table.add_row("FAIL" if check.is_failure else "ok", check.name, check.found, check.expected, check.advice)
    console.print(table)
    failures = sum(check.is_failure for check in checks)
    console.print(f"{failures} of {len(checks)} checks failed" if failures else f"all {len(checks)} checks passed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder that must hold the starting weights of the full size")
    parser.add_argument("--data", type=Path, help="folder that must hold the datasets of --mixture")
    parser.add_argument("--mixture", default="refvos_s", help="file in configs/data (default: %(default)s)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs go (default: %(default)s)")
    parser.add_argument("--quantization", action="store_true", help="bitsandbytes must be usable")
    parser.add_argument("--lock", type=Path, help="lock file (default: the one for this Python beside pyproject.toml)")
    options = parser.parse_args(arguments)
    try:
        checks = list(examine(options))
    except ValueError as error:
        sys.exit(f"error: {error}")
    report(checks, Console(width=None if sys.stdout.isatty() else 140))
    sys.exit(1 if any(check.is_failure for check in checks) else 0)


if __name__ == "__main__":
    main()
