"""Multimodal LLMs, one file per family."""
