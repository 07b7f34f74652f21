"""GLUS: referring video object segmentation with one multimodal LLM and SAM2 (CVPR 2025)."""

__version__ = "0.1.0"
