"""The optimizer and the schedules of learning rate and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class OptimName(Enum):
    """Which update rule."""

    adamw = "adamw"


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019); norms and biases are not decayed."""

    name: OptimName = OptimName.adamw
    lr: float = MISSING
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm; 0 turns clipping off


class ScheduleKind(Enum):
    """The learning rate after the warm-up; formulas in `optim/schedules.py`."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then `kind` down to `min_ratio` x peak."""

    kind: ScheduleKind = ScheduleKind.cosine
    warmup: float = 0.01  # below 1: share of the run; otherwise steps
    min_ratio: float = 0.1
    decay: float = 0.2  # wsd only: length of the final decay; below 1: share of the run


@dataclass(frozen=True, slots=True)
class BatchRampConfig:
    """Grow the global batch from `start` by `increment` to `train.global_batch`, over `samples` samples."""

    start: int = 0  # 0: no ramp
    increment: int = 0
    samples: int = 0
