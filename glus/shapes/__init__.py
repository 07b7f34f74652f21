"""Shapes, the benchmark that we draw ourselves, and the small towers that are pre-trained for it."""
