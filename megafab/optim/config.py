"""The optimizer and the schedules of learning rate and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class OptimName(Enum):
    """Which update rule."""

    adamw = "adamw"
    lion = "lion"
    muon = "muon"
    soap = "soap"


# They update matrices, not elements: engines that deal ranges of parameters to ranks cannot shard them.
WHOLE_MATRICES = (OptimName.muon, OptimName.soap)


class MuonScale(Enum):
    """By what a Muon update is multiplied, given the rows and columns of its matrix."""

    moonlight = "moonlight"  # 0.2 sqrt(max(rows, columns)): as large as AdamW's, whose lr and decay serve
    keller = "keller"  # sqrt(max(1, rows / columns)): Jordan's, for an lr of 0.02


@dataclass(frozen=True, slots=True)
class MuonConfig:
    """`optim/muon.py`."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5  # Newton-Schulz iterations
    scale: MuonScale = MuonScale.moonlight
    adamw_lr_ratio: float = 1.0  # of what AdamW updates: its learning rate over optim.lr


@dataclass(frozen=True, slots=True)
class SOAPConfig:
    """`optim/soap.py`."""

    shampoo_beta: float = 0.95  # decay of the gradient statistics
    frequency: int = 10  # steps between updates of the eigenvectors
    max_dim: int = 10_000  # longer sides of a matrix are not preconditioned


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """The optimizer; norms and biases are not decayed.

    AdamW (Loshchilov and Hutter 2019) and Lion update every element on its own. Muon and SOAP update whole
    matrices of the layers, and the rest (embeddings, head, router, norms, biases) with AdamW.
    """

    name: OptimName = OptimName.adamw
    lr: float = MISSING
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float | None = 1e-8  # null for lion, which has none
    clip: float = 1.0  # global gradient norm; 0 turns clipping off
    muon: MuonConfig | None = None
    soap: SOAPConfig | None = None


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


class Count(Enum):
    """Which tokens `train.tokens` counts, for the end of the run and for the learning rate."""

    tokens = "tokens"  # the positions of all sequences
    layer_tokens = "layer_tokens"  # those that the mean layer computes (Yao et al. 2022)


@dataclass(frozen=True, slots=True)
class BatchRampConfig:
    """Grow the global batch from `start` by `increment` to `train.global_batch`, over `samples` samples."""

    start: int = 0  # 0: no ramp
    increment: int = 0
    samples: int = 0
