"""Where GLUS meets other people's builds: torchvision without operators, and a missing compiler.

PyPI's torchvision, which sam2 brings along, is built against a CUDA torch. Beside a CPU torch its operator library
does not load, and ``import torchvision`` (hence parts of transformers and peft) fails with "operator
torchvision::nms does not exist", because it registers fake kernels for schemas that nobody declared. Declaring the
two schemas first lets the import succeed; GLUS calls no torchvision operator.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def prepare_torchvision() -> torch.library.Library | None:
    """Make ``import torchvision`` safe; call before importing transformers or peft.

    Returns:
        The library that holds the declared schemas (kept alive by the cache), or None where torchvision is not
        installed, is imported already, or loads by itself.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        import torchvision  # noqa: F401

        return library
    return None


def check_compiler(device: torch.device) -> None:
    """Compile one line, so that ``torch.compile`` fails now and clearly instead of in the first step.

    Args:
        device: where the compiled code is to run.

    Raises:
        ValueError: it cannot be compiled; the message names the config key.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except RuntimeError as error:  # of torch.compile: whatever went wrong is the cause that it names
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(
            f"trainer.compile: torch.compile does not work here ({reason}): install a C++ compiler "
            "(apt install g++; the variable CXX names another one), or set trainer.compile=false"
        ) from error
