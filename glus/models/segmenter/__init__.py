"""Segmenters, one file per family, and their memory."""
