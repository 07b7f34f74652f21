"""Scoring of predictions: no torch, no models."""
