"""Fused kernels for the core layers; see README.md."""
