"""Checkpoints: logical tensors by name, committed atomically."""
