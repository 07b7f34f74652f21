"""The training loop and its DeepSpeed engine."""
