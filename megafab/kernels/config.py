"""Settings of the kernels."""

from __future__ import annotations

from enum import Enum


class Kernels(Enum):
    """What computes the layers that are not matrix products (`megafab/kernels/README.md`)."""

    auto = "auto"  # CUDA where there is a GPU and what builds them, else the reference
    cuda = "cuda"
    apex = "apex"  # apex where it has one, else as auto
    reference = "reference"  # torch's own operators
