"""Segmenting videos with a trained model, and writing the result."""
