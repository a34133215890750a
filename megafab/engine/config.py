"""Which engine steps the model, and how it talks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class EngineName(Enum):
    """Which library steps the model."""

    megatron = "megatron"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`megatron`: Megatron-core DDP with its distributed optimizer."""

    name: EngineName = EngineName.megatron
    overlap_grad_reduce: bool = True  # reduce each gradient bucket while backward goes on
    overlap_param_gather: bool = False  # gather updated parameters during the next forward
    bucket_parameters: int = 40_000_000  # parameters per communication bucket
