"""What a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class Packing(Enum):
    """How documents share a sequence."""

    document = "document"  # documents share a sequence but cannot see each other; positions restart
    concatenate = "concatenate"  # one stream: attention and positions cross document boundaries


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Shards made by `megafab data` and how to draw from them."""

    path: str = MISSING  # the directory with manifest.json
    mixture: dict[str, float] | None = None  # domain weights; null: by training tokens
    temperature: float = 1.0  # of mixture=null: weights are tokens^temperature; 0: all domains alike
    max_epochs: float | None = None  # a domain read this often is left out from then on; null: no limit
    skip: tuple[tuple[int, ...], ...] = ()  # [first, count] of samples to pass over, as sample ids go
    block: int = 1  # samples in a row that come from one domain; train.micro_batch: a domain a micro-batch
    packing: Packing = Packing.document
    retrieval: str | None = None  # neighbours of the chunks, by `megafab data retrieval`: a name or a path
    prefetch: bool = True  # read the next step's batch in a background thread


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Loss on the validation split, domain by domain."""

    every: int = 0  # steps between evaluations; 0: only at the end
    samples: int = 64  # sequences per domain, always the same ones; 0: no evaluation at all
