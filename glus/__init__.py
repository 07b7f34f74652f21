"""GLUS: referring video object segmentation with one multimodal LLM and SAM2 (CVPR 2025).

``glus.segment(video, texts, weights)`` segments what sentences describe in a video.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glus.inference.segment import segment

__version__ = "0.1.0"
__all__ = ["segment"]


def __getattr__(name: str) -> Any:
    """``segment``, imported when it is first asked for: ``import glus`` itself loads nothing."""
    if name != "segment":
        raise AttributeError(f"module 'glus' has no attribute {name!r}")
    from glus.inference.segment import segment

    return segment
