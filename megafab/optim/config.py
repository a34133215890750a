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
    inverse_sqrt = "inverse_sqrt"
    wsd = "wsd"  # stable, then a decay at the end
    infinite = "infinite"  # a cooldown to a constant that a run can go on from; an anneal at the end


class Fall(Enum):
    """How the learning rate gets down in a phase."""

    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"  # 1 - sqrt(p): steep at first
    inverse_sqrt = "inverse_sqrt"  # 1 / sqrt(1 + 10 p): steeper still
    exponential = "exponential"  # by the same factor each step


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then `kind`.

    Lengths below 1 are shares of the run, others steps; ratios are of the peak, `optim.lr`. A key that `kind`
    does not have is null.
    """

    kind: ScheduleKind = ScheduleKind.cosine
    warmup: float = 0.01
    start_ratio: float = 0.0  # where the warm-up begins: re-warming goes on from where another run ended
    min_ratio: float = 0.1
    cooldown: float | None = None  # infinite: length of the fall from the peak to the constant
    cooldown_shape: Fall | None = None  # infinite
    constant_ratio: float | None = None  # infinite
    decay: float | None = None  # wsd, infinite: length of the fall at the end; 0: none
    decay_shape: Fall | None = None  # wsd, infinite


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
