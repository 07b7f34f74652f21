"""GLUS: referring video object segmentation with one multimodal LLM and SAM2 (CVPR 2025).

``glus.segment(video, texts, weights)`` segments what sentences describe in a video, ``glus.stream`` gives the answers
frame by frame, ``glus.load(weights)`` a model for many videos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glus.inference.segment import load, segment, stream

__version__ = "0.1.0"
__all__ = ["load", "segment", "stream"]


def __getattr__(name: str) -> Any:
    """Functions, imported when they are first asked for: ``import glus`` itself loads nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'glus' has no attribute {name!r}")
    from glus.inference import segment

    return getattr(segment, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
